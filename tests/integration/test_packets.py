"""The packet lane from end to end: the bits and refusals of TCP, cuts at each message, fences, drains, deadlines."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.errors import DeadlineExceededError, FencedError, NonFiniteGradientError, Reason, UnavailableError
from stepwire.transports.packets import PacketLane
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from tests.integration.training import SMALL, assert_same_result, bits, same_bits

pytestmark = pytest.mark.many

RETRY = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
STEPS = 6


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[bool, Server]]:
    """A server that shares memory, and one that does not."""
    config = {"bind": "127.0.0.1:0", "device": "cpu", "sweep_seconds": 3600.0}
    with Server(ServerConfig(**config)) as one, Server(ServerConfig(**config, shared_memory=False)) as other:
        yield {True: one, False: other}


def opened(server: Server, transport: str = "packets", **options: Any) -> stepwire.Client:
    return stepwire.connect(server.target, transport=transport, timeout=120.0, **{"retry": RETRY} | options)


def trained(session: stepwire.Session, **options: Any) -> Any:
    answers = [bits(session.step(SMALL.gradient(step), **options)) for step in range(1, STEPS + 1)]
    return answers, session.last_result, session.state()


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "views": ({}, {"out": "views"}),
    "no reply": ({}, {"reply": "none"}),
    "another dtype": ({}, {"reply_dtype": "bfloat16"}),
    "changed": ({"reply_dtype": "bfloat16"}, {"reply": "changed"}),
    "overlap": ({"non_finite": "allow"}, {"overlap": True, "reply_first": ["scale"]}),
    "settings": ({"clip_grad_norm": 1.0}, {"lr": 0.5}),
}


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("kind", OPTIONS)
def test_steps_on_a_lane_have_the_bits_of_tcp(servers: dict[bool, Server], memory: bool, kind: str) -> None:
    creating, stepping = OPTIONS[kind]
    found = []
    for transport in ("tcp", "packets"):
        with opened(servers[memory], transport) as client, SMALL.create(client, **creating) as session:
            options = dict(stepping)
            if options.get("out") == "views":
                options = {"out": session.shared_parameters()} if transport == "packets" and memory else {}
            found.append(trained(session, **options))
            assert session.transport is not None and session.transport.name == transport
            assert session.statistics().streams_opened == 1
    assert found[0][0] == found[1][0]
    assert_same_result(found[0][1], found[1][1])
    assert same_bits(found[0][2], found[1][2])


def test_without_shared_memory_small_sessions_have_packets_and_large_ones_messages(servers: dict[bool, Server]) -> None:
    with opened(servers[False], "auto") as client, SMALL.create(client) as session:
        session.attach()
        assert session.transport is not None and session.transport.name == "packets"
        assert session.transport.reasons["shm"].startswith("shared memory is switched off on this server")
        with pytest.raises(stepwire.UnsupportedFeatureError, match="shares no memory with its server: shared memory"):
            session.shared_gradients()
        with client.create_session({"w": np.zeros(20_000, np.float32)}) as large:
            large.attach()
            assert large.transport is not None and large.transport.name == "uds"
            assert "too large for packets" in large.transport.reasons["packets"]


def test_a_server_without_lanes_is_used_in_shared_memory() -> None:
    with Server(ServerConfig(bind="127.0.0.1:0", device="cpu", packets=False)) as server:
        assert "transport_packets" not in server.handoff.sharing.features_off ^ {"transport_packets"}
        with opened(server, "auto") as client, SMALL.create(client) as session:
            session.step(SMALL.gradient(1))
            assert session.transport is not None and session.transport.name == "shm"
            assert session.transport.reasons["packets"] == (
                "packet lanes are switched off on this server (--no-packets)"
            )


def test_watchers_see_the_transport(servers: dict[bool, Server]) -> None:
    with opened(servers[True]) as client, SMALL.create(client) as session:
        session.step(SMALL.gradient(1))
        told = {each.session_id: each.transports for each in next(client.statistics()).sessions}
        assert told[session.session_id] == ("packets",)


@pytest.mark.parametrize("memory", [True, False])
def test_a_refusal_is_that_of_tcp_and_the_session_goes_on(servers: dict[bool, Server], memory: bool) -> None:
    told, bad = [], SMALL.gradient(2)
    bad["w"][3, 4] = np.nan
    for transport in ("tcp", "packets"):
        with opened(servers[memory], transport) as client, SMALL.create(client) as session:
            session.step(SMALL.gradient(1))
            with pytest.raises(NonFiniteGradientError) as refused:
                session.step(bad)
            after = bits(session.step(SMALL.gradient(2)))
            told.append((str(refused.value), refused.value.reason, refused.value.metadata, after))
    assert told[0] == told[1]


def test_another_client_fences_the_one_on_a_lane(servers: dict[bool, Server]) -> None:
    with opened(servers[True]) as client, SMALL.create(client) as session:
        session.step(SMALL.gradient(1))
        with opened(servers[True]) as other:
            taken = other.session(session.session_id)
            taken.attach(take_over=True)
            taken.step(SMALL.gradient(2))
            with pytest.raises(FencedError) as refused:
                session.step(SMALL.gradient(3))
            assert (refused.value.reason, taken.applied_step) == (Reason.FENCED, 2)


@pytest.mark.parametrize(("kind", "most"), [("new", 66), ("out", 70), ("in place", 74)])
def test_a_small_step_makes_few_calls_of_python(servers: dict[bool, Server], kind: str, most: int) -> None:
    """The caller's thread makes all of it, and looks at each array in C alone."""
    with opened(servers[True]) as client:
        start = {f"w{index}": np.zeros((5, 5), np.float32) for index in range(10)}
        with client.create_session(start) as session:
            gradient, out = {name: array + 1 for name, array in start.items()}, None
            if kind == "out":
                out = {name: array.copy() for name, array in start.items()}
            elif kind == "in place":
                gradient, out = session.shared_gradients(), session.shared_parameters()  # type: ignore[assignment]
            for _ in range(3):
                session.step(gradient, out=out)
            calls: list[str] = []
            sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_qualname) if event == "call" else None)
            try:
                session.step(gradient, out=out)
            finally:
                sys.setprofile(None)
    assert len(calls) <= most, calls


# --- cuts ----------------------------------------------------------------------------------------------------


class Cut:
    """Ends the lanes of this process's clients at one of their messages: before it is sent or read, or after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        begin, receive = PacketLane.__init__, PacketLane.receive

        def cut_begin(lane: PacketLane, *arguments: Any) -> None:
            begin(lane, *arguments)
            put = lane.put

            def cut_put(message: Any, flags: int) -> int:
                self._point(lane)
                try:
                    return put(message, flags)
                finally:
                    self._point(lane)

            lane.put = cut_put  # type: ignore[assignment]

        def cut_receive(lane: PacketLane, seconds: float) -> bytes | None:
            reply = receive(lane, seconds)
            self._point(lane)
            return reply

        monkeypatch.setattr(PacketLane, "__init__", cut_begin)
        monkeypatch.setattr(PacketLane, "receive", cut_receive)

    def _point(self, lane: PacketLane) -> None:
        self.left -= 1
        if self.left == 0:
            lane._end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("memory", [True, False])
def test_a_lane_that_is_cut_at_any_message_loses_and_repeats_no_step(
    servers: dict[bool, Server], memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(servers[memory], "tcp") as client, SMALL.create(client) as session:
        expected = [bits(session.step(SMALL.gradient(step))) for step in (1, 2)]
    cut, points = Cut(monkeypatch), 0
    with opened(servers[memory]) as client:
        while cut.left <= 0:
            points += 1
            cut.left = points
            with SMALL.create(client) as session:
                assert [bits(session.step(SMALL.gradient(step))) for step in (1, 2)] == expected
                assert session.applied_step == 2
                assert session.info().applied_step == 2
    assert points == (10 if memory else 7), "each step is sent and read, and so is the check of the memory"


def test_a_second_phase_goes_over_the_lane_and_may_be_cut(
    servers: dict[bool, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers with one norm: each shard is checked first, and committed when the other one is."""
    targets = [servers[True].target, servers[False].target]
    found: list[Any] = []
    cut = Cut(monkeypatch)
    for transport, left in (("tcp", -1), ("packets", -1), ("packets", 9), ("packets", 12)):
        cut.left = left
        with (
            stepwire.connect(targets, transport=transport, timeout=120.0, retry=RETRY) as client,
            SMALL.create(client, clip_grad_norm=0.5) as session,
        ):
            found.append([bits(session.step(SMALL.gradient(step))) for step in (1, 2, 3)])
    assert found[1:] == found[:1] * 3


# --- ends ----------------------------------------------------------------------------------------------------


def test_a_deadline_ends_the_wait_and_the_step_counts_once(servers: dict[bool, Server]) -> None:
    with opened(servers[True]) as client, SMALL.create(client) as session:
        session.step(SMALL.gradient(1))
        lock = servers[True].registry.get(session.session_id)._lock
        with lock, pytest.raises(DeadlineExceededError, match="no reply within 0.05 s"):
            session.step(SMALL.gradient(2), timeout=0.05)
        session.step(SMALL.gradient(2))
        assert (session.applied_step, session.info().applied_step) == (2, 2)


def test_a_session_that_nobody_closes_lets_go_of_its_lane(servers: dict[bool, Server], until: Any) -> None:
    server = servers[True]
    with opened(server) as client:
        session = SMALL.create(client, keep=True)
        session.step(SMALL.gradient(1))
        assert len(server.registry.streams) == 1
        del session
        until(lambda: not len(server.registry.streams))


def test_a_drain_answers_what_is_under_way_and_ends_all_lanes(until: Callable[..., None]) -> None:
    with Server(ServerConfig(bind="127.0.0.1:0", device="cpu", sweep_seconds=0.05, drain_seconds=20.0)) as server:
        never = stepwire.Retry(uniform=lambda low, high: 3600.0)
        with opened(server, retry=never) as client:
            sessions = [SMALL.create(client) for _ in range(12)]
            for session in sessions:
                session.step(SMALL.gradient(1))
            busy = sessions[0]
            with ThreadPoolExecutor(2) as pool:
                until(lambda: server.statistics().drain.steps == 0)  # a reply comes before the server is done
                with server.registry.get(busy.session_id)._lock:
                    under_way = pool.submit(busy.step, SMALL.gradient(2))
                    until(lambda: server.statistics().drain.steps == 1)
                    drained = pool.submit(server.drain)
                    until(lambda: server.statistics().drain.started)
                assert sorted(under_way.result(120.0)) == sorted(SMALL.shapes)
                assert drained.result(120.0) is True
            for session in sessions[1:]:
                with pytest.raises(UnavailableError) as refused:
                    session.step(SMALL.gradient(2))
                assert refused.value.reason == Reason.SHUTTING_DOWN
            server.close()
            assert not len(server.registry.streams)
            for session in sessions:
                session.keep()
