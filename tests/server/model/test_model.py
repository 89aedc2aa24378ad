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

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepwire.v1 import attach_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.config import MIB, ServerConfig
from stepwire_server.devices.pool import DevicePool
from stepwire_server.engines import CpuEngine
from stepwire_server.rpc import lane_gate
from stepwire_server.server import Server
from tests.server.model.messages import chunk_message
from tests.server.model.model import Model
from tests.server.model.operations import ALIKE, CONFIGS, LOOP_CONFIGS, OPERATIONS, Config
from tests.server.model.runner import Run
from tests.support.lane_wire import LaneWire, steps_in_lanes, wait_for_loops

EXAMPLES = 300 if os.environ.get("CI") else 40
LEAST_OPERATIONS, MOST_OPERATIONS = 4, 20


@pytest.fixture(scope="module", params=["streams", "packets"])
def channel(connect: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A channel to a server on NumPy, whose streams are gRPC's own or have lanes.

    Kernels of Numba have the same bits (`test_parity`), and would have to be compiled for every config that is drawn.
    """
    config = ServerConfig(bind="127.0.0.1:0", max_chunk_bytes=64 << 10, max_tensors=64, sweep_seconds=0.05)
    pool = DevicePool.of([CpuEngine(threads=1, use_numba=False)], 256 * MIB)
    with Server(config, pool=pool) as server, connect(server.target) as wire:
        if request.param == "streams":
            yield wire
            return
        on_lanes = LaneWire(wire)
        yield on_lanes
        assert on_lanes.lanes > 0


@pytest.fixture(scope="module")
def looped(connect: Any) -> Iterator[tuple[Any, Server]]:
    """A channel to a server whose loop makes every step that it can, and that server."""
    pytest.importorskip("numba")
    config = ServerConfig(bind="127.0.0.1:0", device="cpu", threads=1, max_chunk_bytes=64 << 10, sweep_seconds=0.05)
    with Server(config) as server, connect(server.target) as wire, pytest.MonkeyPatch.context() as patched:
        server.lanes.after_steps = server.lanes.steps_alike = 1
        on_lanes, model = LaneWire(wire), Model(Config(0, 0, False, False, 0.125, False, True, True, 0, 0))
        created = wire.create(model.message())
        frames = [chunk_message(0, model.size, np.ones(model.size), 1) for _ in range(3)]
        for number, frame in enumerate(frames, 1):
            frame.begin.step = number
            frame.commit.SetInParent()
        opening = attach_pb2.AttachOpen(session_id=created.session.session_id, attach_token=created.attach_token)
        on_lanes.stream("Attach", [pb.AttachRequest(open=opening), *frames])
        wait_for_loops(server)
        patched.setattr(lane_gate, "_FIRST_LOOK", 1)
        server.lanes.after_steps = 1 << 30  # no other loop is compiled
        yield on_lanes, server


@pytest.fixture(scope="module")
def refused_type(channel: Any) -> type[Exception]:
    with pytest.raises(Exception) as caught:
        channel.get("nobody")
    return caught.type


def check(channel: Any, refused_type: type[Exception], config: Config, operations: list[Any]) -> None:
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


@given(config=CONFIGS, operations=st.lists(OPERATIONS, min_size=LEAST_OPERATIONS, max_size=MOST_OPERATIONS))
@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_whatever_is_sent_the_session_does_what_the_contract_says(
    channel: Any, refused_type: type[Exception], config: Config, operations: list[Any]
) -> None:
    check(channel, refused_type, config, operations)


@pytest.mark.long
def test_a_loop_does_what_the_contract_says(looped: tuple[Any, Server]) -> None:
    wire, server = looped
    with pytest.raises(Exception) as refused:
        wire.get("nobody")

    @given(config=LOOP_CONFIGS, operations=st.lists(st.one_of(*[ALIKE] * 24, OPERATIONS), min_size=8, max_size=30))
    @settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    def checked(config: Config, operations: list[Any]) -> None:
        check(wire, refused.type, config, operations)

    before = steps_in_lanes(server)
    checked()
    assert steps_in_lanes(server) - before > EXAMPLES // 10
