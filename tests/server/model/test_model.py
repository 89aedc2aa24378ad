"""Sequences of messages against a model of a session, written from the contract and nothing else.

Hypothesis makes the sequences: steps good and bad, cut, shuffled, repeated, left half done; streams that open, fence
and displace one another and end; unary steps, loads and pulls with every fault that fits. The model knows the result of
each message: an answer with these numbers and these parameters, or one of a few statuses where a message has several
faults at once. Parameters are compared with a float64 Adam within a tolerance, and bit for bit with the server's
earlier answers wherever nothing may have changed since.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepwire_server.config import MIB, ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.engines import CpuEngine
from stepwire_server.server import Server
from tests.server.model.operations import CONFIGS, OPERATIONS, Config
from tests.server.model.runner import Run

EXAMPLES = 300 if os.environ.get("CI") else 100
LEAST_OPERATIONS, MOST_OPERATIONS = 4, 20


@pytest.fixture(scope="module")
def channel(connect: Any) -> Iterator[Any]:
    """A channel to a server on NumPy.

    Kernels of Numba have the same bits (`test_parity`), and would have to be compiled for every config that is drawn.
    """
    config = ServerConfig(bind="127.0.0.1:0", max_chunk_bytes=64 << 10, max_tensors=64, sweep_seconds=0.05)
    pool = DevicePool.of([CpuEngine(threads=1, use_numba=False)], 256 * MIB)
    with Server(config, pool=pool) as server, connect(server.target) as wire:
        yield wire


@pytest.fixture(scope="module")
def refused_type(channel: Any) -> type[Exception]:
    with pytest.raises(Exception) as caught:
        channel.get("nobody")
    return caught.type


@given(config=CONFIGS, operations=st.lists(OPERATIONS, min_size=LEAST_OPERATIONS, max_size=MOST_OPERATIONS))
@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_whatever_is_sent_the_session_does_what_the_contract_says(
    channel: Any, refused_type: type[Exception], config: Config, operations: list[Any]
) -> None:
    run = Run(channel, refused_type, config)
    try:
        for operation in operations:
            run.do(operation)
        run.close_all()
        run.check_everything()
    finally:
        for stream in run.streams.values():
            stream.handle.cancel()
        run.delete_left()  # a failure is tried again and again, and must not fill the server
