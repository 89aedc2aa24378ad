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

from tests.server.model.operations import CONFIGS, OPERATIONS, Config
from tests.server.model.runner import Run

EXAMPLES = 300 if os.environ.get("CI") else 100
LEAST_OPERATIONS, MOST_OPERATIONS = 4, 20


@pytest.fixture(scope="module")
def channel(server: Any, connect: Any) -> Iterator[Any]:
    with connect(server.target) as wire:
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
