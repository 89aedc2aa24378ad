"""Compiled lanes from end to end: the tests of packet lanes, on servers that make so every step that they can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import stepwire
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from tests.integration import test_packets as packets
from tests.integration.training import SMALL, assert_same_result, bits, same_bits
from tests.support.lane_wire import steps_in_lanes, wait_for_loops

pytestmark = pytest.mark.many

pytest.importorskip("numba")

STEPS = 12


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[bool, Server]]:
    """A server that shares memory, and one that does not."""
    config = {"bind": "127.0.0.1:0", "device": "cpu", "sweep_seconds": 3600.0}
    with Server(ServerConfig(**config)) as one, Server(ServerConfig(**config, shared_memory=False)) as other:
        for server in (one, other):
            server.lanes.after_steps = server.lanes.steps_alike = 1
        yield {True: one, False: other}


def with_loops(server: Server, session: stepwire.Session, **options: Any) -> None:
    """Step a few times, and wait for the loop that is compiled for such steps."""
    for step in (1, 2, 3):
        session.step(SMALL.gradient(step), **options)
    wait_for_loops(server)


@pytest.fixture(scope="module", autouse=True)
def loops(servers: dict[bool, Server]) -> None:
    """Have the loops of the usual steps ready."""
    for server in servers.values():
        with packets.opened(server) as client, SMALL.create(client) as session:
            with_loops(server, session)


globals().update(
    {name: test for name, test in vars(packets).items() if name.startswith("test_") and "drain" not in name}
)


_TAKEN = ("tcp[plain", "tcp[views", "tcp[settings", "cut_at_any_message")
"""Parts of the names of those tests of packet lanes whose sessions step often enough for a compiled one."""


@pytest.fixture(autouse=True)
def taken(servers: dict[bool, Server], request: pytest.FixtureRequest) -> Iterator[None]:
    """Have a test fail whose steps no loop has made."""
    before = sum(map(steps_in_lanes, servers.values()))
    yield
    made = sum(map(steps_in_lanes, servers.values())) - before
    assert made > 0 or not any(part in request.node.name for part in _TAKEN)


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "no reply": ({}, {"reply": "none"}),
    "clipped": ({"clip_grad_norm": 0.5}, {}),
    "scheduled": ({"schedule": stepwire.Schedule.linear(9, warmup_steps=3)}, {}),
    "bfloat16": (
        {"gradient_dtype": "bfloat16", "reply_dtype": "bfloat16", "state_precision": "bfloat16"},
        {},
    ),
}


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_a_lane_have_the_bits_and_the_results_of_tcp(
    servers: dict[bool, Server], memory: bool, kind: str
) -> None:
    creating, stepping = KINDS[kind]
    server, found, made = servers[memory], [], 0
    for transport in ("tcp", "packets"):
        with packets.opened(server, transport) as client, SMALL.create(client, **creating) as session:
            answers, results, before = [], [], steps_in_lanes(server)
            for step in range(1, STEPS + 1):
                answer = session.step(SMALL.gradient(step), **stepping)
                answers.append(bits(answer) if answer else None)
                results.append(session.last_result)
                if step == 3:
                    wait_for_loops(server)
            found.append((answers, results, session.state()))
            made = steps_in_lanes(server) - before
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert_same_result(one, other)
    assert same_bits(found[0][2], found[1][2])
    assert made >= 6


@pytest.mark.parametrize("ready", [True, False])
def test_a_new_stream_takes_the_loop_that_others_had_compiled(
    servers: dict[bool, Server], monkeypatch: pytest.MonkeyPatch, ready: bool
) -> None:
    """It compiles none itself before so many steps alike."""
    server = servers[True]
    monkeypatch.setattr(server.lanes, "after_steps", 1000)
    options: dict[str, Any] = {} if ready else {"clip_grad_norm": 0.25, "telemetry": "none"}
    with packets.opened(server) as client, SMALL.create(client, **options) as session:
        before = steps_in_lanes(server)
        for step in range(1, 33):
            session.step(SMALL.gradient(step), reply="parameters" if ready else "none")
        assert (steps_in_lanes(server) - before > 16) is ready
