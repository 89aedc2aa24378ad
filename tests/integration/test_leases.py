"""Leases and idle times by a clock that stands still: what nobody uses ends, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.server import Server
from stepwire_server.sessions.registry import Registry
from tests.integration.events import Clock
from tests.integration.probes import chunks_staged, steps_over, stream_ends
from tests.integration.training import TINY, same_bits
from tests.support.raw import RawClient, RawStream, Refused, step_message

_LEASE_SECONDS = 10.0
_IDLE_SECONDS = 5.0
_INSTANT = 1e-3

_SIZE = 1000
GRADIENT = np.random.default_rng(3).standard_normal(_SIZE, np.float32)
HALF, REST = slice(0, 500), slice(500, _SIZE)


@pytest.fixture
def clock() -> Clock:
    """The server's clock."""
    return Clock()


@pytest.fixture
def settings() -> dict[str, Any]:
    """Short times, and no sweep but the tests' own."""
    return {"sweep_seconds": 3600.0, "max_lease_seconds": _LEASE_SECONDS, "step_idle_seconds": _IDLE_SECONDS}


# --- leases ------------------------------------------------------------------------------------------------


def test_an_unused_session_ends_with_its_lease(server: Server, client: stepwire.Client, clock: Clock) -> None:
    session = TINY.create(client)
    clock.advance(_LEASE_SECONDS)
    assert server.registry.sweep() == []
    assert session.pull() is not None
    clock.advance(_LEASE_SECONDS + _INSTANT)
    with pytest.raises(stepwire.SessionNotFoundError):  # before any sweep
        session.pull()
    assert server.registry.sweep() == [session.session_id]
    assert server.registry.statistics()[:3] == (0, 0, 0)
    with pytest.raises(stepwire.SessionNotFoundError) as gone:
        session.step(TINY.gradient(1))
    assert gone.value.metadata["last_known_step"] == "0"
    assert server.registry.sweep() == []


@pytest.mark.parametrize("lease_seconds", [1.0, 4.0])
def test_a_session_may_ask_for_a_shorter_lease(server: Server, client, clock: Clock, lease_seconds: float) -> None:
    session = TINY.create(client, lease_seconds=lease_seconds)
    clock.advance(lease_seconds + _INSTANT)
    assert server.registry.sweep() == [session.session_id]


@pytest.mark.parametrize(
    "use",
    [
        lambda session: session.pull(),
        lambda session: session.state(),
        lambda session: session.load(TINY.parameters()),
    ],
    ids=["pull", "state", "load"],
)
def test_using_a_session_renews_its_lease(server: Server, client, clock: Clock, use: Callable[..., object]) -> None:
    session = TINY.create(client)
    for _ in range(3):
        clock.advance(0.9 * _LEASE_SECONDS)
        use(session)
        assert server.registry.sweep() == []


def test_a_step_in_one_call_renews_the_lease(server: Server, raw: RawClient, clock: Clock) -> None:
    created = raw.create(_SIZE)
    for step in (1, 2, 3, 3):
        clock.advance(0.9 * _LEASE_SECONDS)
        raw.step(created.session.session_id, created.attach_token, step, GRADIENT)
        assert server.registry.sweep() == []


def test_a_call_under_way_keeps_the_lease_from_running(
    server: Server, raw: RawClient, client, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may compile kernels in it, and a reader may be slow; both may take longer than a short lease."""
    created = raw.create(_SIZE)
    session = server.registry.get(created.session.session_id)
    swept: list[str] = []

    def slow(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            clock.advance(2 * _LEASE_SECONDS)
            swept.extend(server.registry.sweep())
            return method(*arguments)

        return called

    for owner, name in (
        (session, "begin"),
        (session, "commit"),
        (session.exchange, "snapshot"),
        (session.exchange, "read"),
    ):
        monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    assert raw.step(session.session_id, created.attach_token, 1, GRADIENT).result.step == 1
    client.session(session.session_id).pull()
    assert swept == []


def test_looking_at_a_session_does_not_renew_its_lease(server: Server, client, clock: Clock) -> None:
    session = TINY.create(client)
    expires = session.info().expire_time
    clock.advance(0.9 * _LEASE_SECONDS)
    assert session.info().applied_step == 0
    assert [info.session_id for info in client.sessions()] == [session.session_id]
    assert (expires - session.info().expire_time).total_seconds() == pytest.approx(0.9 * _LEASE_SECONDS, abs=5.0)
    clock.advance(0.2 * _LEASE_SECONDS)
    assert server.registry.sweep() == [session.session_id]


def test_an_attached_stream_keeps_its_session_alive(server: Server, client, clock: Clock) -> None:
    ended = stream_ends(server.registry)
    session = TINY.create(client)
    session.attach()
    clock.advance(100 * _LEASE_SECONDS)
    assert server.registry.sweep() == []
    session.step(TINY.gradient(1))
    clock.advance(100 * _LEASE_SECONDS)
    session.detach()
    ended.wait()
    clock.advance(_LEASE_SECONDS)  # counted from the end of the stream
    assert server.registry.sweep() == []
    clock.advance(_INSTANT)
    assert server.registry.sweep() == [session.session_id]


def test_closing_a_session_frees_its_memory_at_once(server: Server, client) -> None:
    session, other = TINY.create(client), TINY.create(client)
    both = server.registry.statistics().reserved_bytes
    session.close()
    assert server.registry.statistics().reserved_bytes == both // 2
    other.close()
    assert server.registry.statistics()[:3] == (0, 0, 0)
    session.close()
    assert server.registry.statistics()[:3] == (0, 0, 0)


def test_a_session_that_expired_unswept_does_not_come_back_by_its_request_id(
    server: Server, raw: RawClient, clock: Clock
) -> None:
    first = raw.create(request_id="once")
    clock.advance(_LEASE_SECONDS + _INSTANT)
    again = raw.create(request_id="once")
    assert again.session.session_id != first.session.session_id
    assert raw.step(again.session.session_id, again.attach_token, 1, np.ones(12, np.float32)).result.step == 1
    assert server.registry.sweep() == [first.session.session_id]
    assert raw.create(request_id="once").session.session_id == again.session.session_id


# --- silent streams ----------------------------------------------------------------------------------------


@pytest.fixture
def created(raw: RawClient) -> pb.CreateSessionResponse:
    """A session of zeros."""
    return raw.create(_SIZE)


@pytest.fixture
def stream(raw: RawClient, created: pb.CreateSessionResponse) -> RawStream:
    """A stream attached to it."""
    stream = raw.attach(created.session.session_id, created.attach_token)
    stream.receive()
    return stream


def assert_cancelled(stream: RawStream) -> None:
    """The server has cancelled the stream."""
    with pytest.raises(Refused) as refused:
        stream.receive()
    assert refused.value.code == "CANCELLED"


def test_half_a_step_and_then_silence_is_cancelled_and_freed(server, raw, client, clock, created, stream) -> None:
    session = created.session.session_id
    before, held = client.session(session).state(), server.registry.statistics()
    arrived, ended = chunks_staged(server.registry.get(session)), stream_ends(server.registry)
    stream = raw.attach(session, created.attach_token)
    stream.receive()
    stream.send(step_message(1, GRADIENT, HALF, commit=False))
    arrived.wait()
    clock.advance(_IDLE_SECONDS)
    server.registry.sweep()
    assert server.registry.statistics().reserved_bytes == held.reserved_bytes + 4 * _SIZE
    clock.advance(_INSTANT)
    server.registry.sweep()
    assert_cancelled(stream)
    ended.wait()
    assert server.registry.statistics().reserved_bytes == held.reserved_bytes
    assert same_bits(client.session(session).state(), before)
    again = raw.attach(session, stream.token)
    assert again.receive().opened.applied_step == 0
    assert not again.step(step_message(1, GRADIENT)).replayed


def test_a_slow_step_is_left_alone_while_it_moves(server, clock, created, stream) -> None:
    arrived = chunks_staged(server.registry.get(created.session.session_id))
    for index in range(10):
        part = slice(100 * index, 100 * (index + 1))
        clock.advance(0.9 * _IDLE_SECONDS)
        server.registry.sweep()
        stream.send(step_message(1, GRADIENT, part, begin=index == 0, commit=False))
        arrived.wait()
    clock.advance(0.9 * _IDLE_SECONDS)
    server.registry.sweep()
    stream.send(pb.AttachRequest(commit={}))
    assert stream.receive().result.step == 1


def test_a_stream_between_steps_may_be_silent_for_ever(server, clock, created, stream) -> None:
    over = steps_over(server.registry.get(created.session.session_id))
    for step in (1, 2, 3):
        assert stream.step(step_message(step, GRADIENT)).step == step
        over.wait()
        clock.advance(1000 * _IDLE_SECONDS)
        assert server.registry.sweep() == []


def test_a_fenced_stream_that_stays_silent_is_cancelled(server, raw, clock, created, stream) -> None:
    holder = raw.attach(created.session.session_id)
    holder.receive()
    clock.advance(_IDLE_SECONDS + _INSTANT)
    server.registry.sweep()
    assert_cancelled(stream)
    assert holder.step(step_message(1, GRADIENT)).step == 1


@pytest.mark.parametrize("steps", [0, 1])
def test_the_silent_stream_of_an_ended_session_is_told_at_once(server, raw, created, stream, steps: int) -> None:
    if steps:
        stream.step(step_message(1, GRADIENT))
    raw.call("DeleteSession", pb.DeleteSessionRequest(session_id=created.session.session_id))
    assert_gone(stream)
    assert server.registry.statistics().reserved_bytes == 0


def test_the_real_client_is_told_of_the_end_of_its_session(client: stepwire.Client) -> None:
    session = TINY.create(client)
    session.step(TINY.gradient(1))
    client.session(session.session_id).close()
    with pytest.raises(stepwire.SessionNotFoundError) as gone:
        session.step(TINY.gradient(2))
    assert gone.value.metadata["last_known_step"] == "1"


def test_a_session_that_ends_inside_a_step_tells_it_and_frees_its_memory(server, raw, created, stream) -> None:
    arrived, ended = chunks_staged(server.registry.get(created.session.session_id)), stream_ends(server.registry)
    busy = raw.attach(created.session.session_id, created.attach_token)
    busy.receive()
    busy.send(step_message(1, GRADIENT, HALF, commit=False))
    arrived.wait()
    raw.call("DeleteSession", pb.DeleteSessionRequest(session_id=created.session.session_id))
    assert_gone(busy)
    assert_gone(stream)  # which the newer one had displaced
    ended.wait()
    assert server.registry.statistics().reserved_bytes == 0


def test_the_stream_of_an_expired_session_is_told(server, clock, raw, created, stream) -> None:
    """Its lease runs only without a stream, so a displaced one is left: the holder has gone."""
    ended = stream_ends(server.registry)
    holder = raw.attach(created.session.session_id)
    holder.receive()
    holder.cancel()
    ended.wait()
    clock.advance(_LEASE_SECONDS + _INSTANT)
    stream_seen(server.registry)
    assert server.registry.sweep() == [created.session.session_id]
    assert_gone(stream)


def stream_seen(registry: Registry) -> None:
    """Have streams be heard just now: the sweep cancels displaced ones that are silent."""
    for each in registry.streams:
        each.last_seen = registry.clock()


def assert_gone(stream: RawStream) -> None:
    """The server says that there is no such session."""
    with pytest.raises(Refused) as refused:
        stream.receive()
    assert refused.value.row == ("NOT_FOUND", "SESSION_NOT_FOUND")
