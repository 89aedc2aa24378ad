"""Too many, too large, too long, or nothing at all (facts: attacks 8, 10, 11, 12)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2, tensor_pb2

pytestmark = pytest.mark.many

IDLE_SECONDS = 60.0
LONG_LEASE = {"max_lease_seconds": 1e9}


def opened(live: Any) -> Any:
    """Attach, and wait for the newest token."""
    stream = live.wire.open()
    stream.send(live.opening())
    live.attached(stream.receive())
    return stream


def test_streams_beyond_the_most_are_refused_until_one_ends(
    serve: Any, connect: Any, make_live: Any, make_config: Any, refusal: Any
) -> None:
    with serve(max_streams=3) as server, connect(server.target) as wire:
        lives = [make_live(wire, wire.create(make_config((2,)))) for _ in range(4)]
        streams = [opened(live) for live in lives[:3]]
        before = lives[3].fingerprint()
        refused = refusal(
            lambda: lives[3].step(1), "RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS", "3 attached streams, its most"
        )
        assert (refused.metadata, refused.retry_after) == ({"max_streams": "3"}, 1.0)
        assert lives[3].fingerprint() == before
        streams[1].finish()
        with pytest.raises(StopIteration):
            streams[1].receive()
        assert lives[3].step(1).step == 1
        for stream in streams:
            stream.cancel()


def test_a_client_comes_back_to_a_full_server_that_still_counts_its_stream(
    serve: Any, connect: Any, make_live: Any, make_config: Any, refusal: Any
) -> None:
    """Its connection broke without the server's notice."""
    with serve(max_streams=1) as server, connect(server.target) as wire, connect(server.target) as again:
        live = make_live(wire, wire.create(make_config((2,))))
        half_open = opened(live)
        stream = again.open()
        stream.send(live.opening(), live.frame(begin=1, commit=True, payload=live.gradient(1)))
        live.attached(stream.receive())
        assert pb.AttachResponse.FromString(stream.receive()).result.step == 1
        refusal(half_open.receive, "CANCELLED", "")
        stream.cancel()


def test_a_stream_that_has_been_idle_for_long_gives_its_place_and_steps_all_the_same(
    serve: Any, connect: Any, make_live: Any, make_config: Any, clock: Any, until: Any, refusal: Any
) -> None:
    with serve(max_streams=2, **LONG_LEASE) as server, connect(server.target) as wire:
        lives = [make_live(wire, wire.create(make_config((2,)))) for _ in range(3)]
        first = opened(lives[0])
        until(lambda: server.statistics().calls.waiting == 0)
        clock.now += IDLE_SECONDS + 1
        second = opened(lives[1])
        until(lambda: server.statistics().calls.waiting == 0)
        third = opened(lives[2])
        refusal(first.receive, "CANCELLED", "")
        for live, stream in zip(lives[1:], (second, third), strict=True):
            stream.send(live.frame(begin=1, commit=True))
            assert pb.AttachResponse.FromString(stream.receive()).result.step == 1
        refusal(lambda: lives[0].step(1), "RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS")
        second.finish()
        with pytest.raises(StopIteration):
            second.receive()
        assert lives[0].step(1).step == 1
        third.cancel()


def test_streams_that_never_open_keep_nobody_from_attaching(
    serve: Any, connect: Any, make_live: Any, make_config: Any, until: Any
) -> None:
    with serve(max_streams=2) as server, connect(server.target) as wire, connect(server.target) as flood:
        live = make_live(wire, wire.create(make_config((2,))))
        silent = [flood.open() for _ in range(30)]
        until(lambda: sum(stream.over for stream in silent) == 20)
        stream = opened(live)
        stream.send(live.frame(begin=1, commit=True))
        assert pb.AttachResponse.FromString(stream.receive()).result.step == 1
        stream.cancel()
        for each in silent:
            each.cancel()


def test_a_flood_of_streams_leaves_room_for_calls(
    serve: Any, connect: Any, make_live: Any, make_config: Any, until: Any
) -> None:
    """Streams that never open count like the others, so they cannot take the threads of calls.

    Eight more than the most are admitted: one of them might displace a stream whose connection is half open.
    """
    with serve(max_streams=2) as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((2,))))
        silent = [wire.open() for _ in range(100)]
        until(lambda: server.registry.statistics().streams == 10 and sum(stream.over for stream in silent) == 90)
        answer = pb.StepResponse.FromString(wire.unary("Step", live.unary_step(1)))
        assert (answer.result.step, wire.info().sessions) == (1, 1)
        for stream in silent:
            stream.cancel()
        until(lambda: server.registry.statistics().streams == 0)


def test_a_stream_that_never_opens_is_cancelled(serve: Any, connect: Any, clock: Any, until: Any, refusal: Any) -> None:
    with serve() as server, connect(server.target) as wire:
        stream = wire.open()
        until(lambda: server.registry.statistics().streams == 1)

        def silence() -> bool:
            clock.now += IDLE_SECONDS + 1
            return bool(stream.over)

        until(silence)
        refusal(stream.receive, "CANCELLED", "")
        until(lambda: server.registry.statistics().streams == 0)


@pytest.mark.parametrize("chunks", [0, 1])
def test_half_a_step_and_then_silence_is_cancelled_and_leaves_nothing(
    serve: Any, connect: Any, make_live: Any, make_config: Any, clock: Any, until: Any, refusal: Any, chunks: int
) -> None:
    with serve(**LONG_LEASE) as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((10,))))
        before, reserved = live.fingerprint(), wire.reserved_bytes()
        stream = opened(live)
        stream.send(live.frame(0, 4, begin=1) if chunks else pb.AttachRequest(begin=step_pb2.StepBegin(step=1)))
        until(lambda: wire.reserved_bytes() == reserved + 40)

        def silence() -> bool:
            clock.now += IDLE_SECONDS + 1
            return bool(stream.over)

        until(silence)
        refusal(stream.receive, "CANCELLED", "")
        until(lambda: wire.reserved_bytes() == reserved and not wire.get(live.id).attached)
        assert live.fingerprint() == before
        assert live.step(1).replayed is False


def test_silence_between_steps_is_nobodys_business(
    serve: Any, connect: Any, make_live: Any, make_config: Any, clock: Any, until: Any, monkeypatch: Any
) -> None:
    """And while a stream is attached, the lease does not run.

    The answer is here a moment before the server has left the step, so the clock waits for that.
    """
    with serve() as server, connect(server.target) as wire:
        streams: list[Any] = []
        stream_of = server.registry.streams.stream

        @contextlib.contextmanager
        def watched(cancel: Any) -> Iterator[Any]:
            with stream_of(cancel) as attached:
                streams.append(attached)
                yield attached

        monkeypatch.setattr(server.registry.streams, "stream", watched)
        live = make_live(wire, wire.create(make_config((10,))))
        stream = opened(live)
        for step in (1, 2):
            until(lambda: not streams[0].in_step and server.statistics().calls.waiting == 0)
            clock.now += 1e6
            assert server.registry.sweep() == []
            stream.send(live.frame(begin=step, commit=True))
            assert pb.AttachResponse.FromString(stream.receive()).result.step == step
        stream.cancel()


@pytest.mark.parametrize("messages", [0, 1, 2])
def test_half_a_load_and_then_silence_is_cancelled_and_leaves_nothing(
    serve: Any, connect: Any, make_live: Any, make_config: Any, clock: Any, until: Any, refusal: Any, messages: int
) -> None:
    """It would hold its staging memory for ever, and a draining server would wait for it."""
    import numpy as np

    with serve(**LONG_LEASE) as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((10,))))
        before, reserved = live.fingerprint(), wire.reserved_bytes()
        stream = wire.open("Load")
        stream.send(*[live.load_opening(1), live.load_chunk("param", 0, np.ones(4, np.float32))][:messages])
        if messages:
            until(lambda: wire.reserved_bytes() == reserved + 40)

        def silence() -> bool:
            clock.now += IDLE_SECONDS + 1
            return bool(stream.over)

        until(silence)
        refusal(stream.receive, "CANCELLED", "")
        until(lambda: wire.reserved_bytes() == reserved)
        assert live.fingerprint() == before
        assert server.drain() is True


@pytest.mark.parametrize("same_client", [False, True])
def test_a_displaced_stream_that_stays_silent_is_cancelled(
    serve: Any,
    connect: Any,
    make_live: Any,
    make_config: Any,
    clock: Any,
    until: Any,
    refusal: Any,
    same_client: bool,
) -> None:
    with serve(**LONG_LEASE) as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((10,))))
        first = opened(live)
        live.token = live.token if same_client else 0
        second = opened(live)
        until(lambda: server.statistics().calls.waiting == 0)

        def silence() -> bool:
            clock.now += IDLE_SECONDS + 1
            return bool(first.over)

        until(silence)
        refusal(first.receive, "CANCELLED", "")
        second.send(live.frame(begin=1, commit=True))
        assert pb.AttachResponse.FromString(second.receive()).result.step == 1
        second.cancel()


def test_a_worker_keeps_one_displaced_stream_waiting(live: Any, until: Any, refusal: Any) -> None:
    """The third client ends the first stream at once, without waiting for a sweep."""
    first, live.token = opened(live), 0
    second, live.token = opened(live), 0
    assert not first.over
    third = opened(live)
    until(lambda: first.over)
    refusal(first.receive, "CANCELLED", "")
    assert not second.over
    for stream in (second, third):
        stream.cancel()


def test_sessions_beyond_the_most_are_refused_and_unused_ones_make_room(
    serve: Any, connect: Any, make_live: Any, make_config: Any, clock: Any, until: Any, refusal: Any
) -> None:
    """Create without use: the lease frees what nobody came back for."""
    with serve(max_sessions=3) as server, connect(server.target) as wire:
        config = make_config((100,), lease=Duration(seconds=30))
        lives = [make_live(wire, wire.create(config)) for _ in range(3)]
        reserved = wire.reserved_bytes()
        refused = refusal(
            lambda: wire.create(config), "RESOURCE_EXHAUSTED", "TOO_MANY_SESSIONS", "3 sessions, its most"
        )
        assert (refused.metadata, refused.retry_after) == ({"max_sessions": "3", "idle_sessions": "3"}, None)
        assert (wire.info().sessions, wire.reserved_bytes()) == (3, reserved)
        clock.now += 20.0
        lives[0].step(1)
        clock.now += 20.0
        until(lambda: wire.info().sessions == 1)
        assert wire.reserved_bytes() == reserved // 3
        refusal(lambda: wire.get(lives[1].id), "NOT_FOUND", "SESSION_NOT_FOUND", lives[1].id)
        assert lives[0].step(2).step == 2
        for _ in range(2):
            wire.create(config)


def test_memory_beyond_the_budget_is_refused_and_comes_back(
    serve: Any, connect: Any, make_live: Any, make_config: Any, refusal: Any
) -> None:
    with serve(memory_budget=100_000) as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((4000,))))
        assert wire.reserved_bytes() == 48_000
        refused = refusal(
            lambda: wire.create(make_config((5000,))), "RESOURCE_EXHAUSTED", "MEMORY_EXHAUSTED", "60000", "52000"
        )
        assert refused.metadata == {"requested_bytes": "60000", "available_bytes": "52000", "idle_sessions": "1"}
        wire.create(make_config((3500,)))
        refused = refusal(lambda: live.step(1), "RESOURCE_EXHAUSTED", "MEMORY_EXHAUSTED", "16000 bytes", "10000")
        assert refused.retry_after is not None
        refusal(lambda: wire.unary("Step", live.unary_step(1)), "RESOURCE_EXHAUSTED", "MEMORY_EXHAUSTED", "16000")
        assert wire.get(live.id).applied_step == 0
        wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))
        assert wire.reserved_bytes() == 42_000


def test_a_session_whose_step_could_never_fit_is_refused_at_creation(
    serve: Any, connect: Any, make_config: Any, refusal: Any
) -> None:
    with serve(memory_budget=100_000) as server, connect(server.target) as wire:
        refusal(lambda: wire.create(make_config((7000,))), "RESOURCE_EXHAUSTED", "MEMORY_EXHAUSTED", "112000")
        assert wire.reserved_bytes() == 0


@pytest.mark.parametrize("kilobytes", [32, 200])
def test_huge_metadata_is_refused(live: Any, untouched: Any, kilobytes: int) -> None:
    """By gRPC, before anything of ours sees it."""
    metadata = (("x-flood", "y" * (kilobytes << 10)),)
    request = live.unary_step(2)
    untouched(lambda: live.wire.unary("Step", request, metadata=metadata), "RESOURCE_EXHAUSTED", "")


@pytest.mark.parametrize("method", ["Attach", "Step", "CreateSession", "Load"])
def test_oversized_messages_are_refused(live: Any, untouched: Any, method: str) -> None:
    data = bytes([15 << 3 | 2]) + b"\x80\x80\x80\x14" + bytes(40 << 20)
    untouched(lambda: live.wire.stream(method, [data]), "RESOURCE_EXHAUSTED", "", "larger than max")


def test_a_compression_bomb_does_not_unfold(server: Any, live: Any, untouched: Any, connect: Any) -> None:
    """40 MiB of zeros travel as 40 KiB, and are refused as such."""
    with connect(server.target, default_compression_algorithm=grpc.Compression.Gzip.value) as wire:
        data = bytes([15 << 3 | 2]) + b"\x80\x80\x80\x14" + bytes(40 << 20)
        untouched(lambda: wire.stream("Attach", [data]), "UNIMPLEMENTED", "", "algorithm 'gzip' is disabled")


def test_padding_is_not_kept(live: Any, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks wait for the commit; if each kept its whole message, a small gradient could hold gigabytes."""
    from stepwire_server.engines.cpu.state import CpuGradient

    kept: list[int] = []
    put = CpuGradient.put

    def watching(buffer: CpuGradient, offset: int, payload: Any, *count: int) -> Any:
        owner = payload
        while getattr(owner, "base", None) is not None:
            owner = owner.base
        kept.append(len(owner) if isinstance(owner, bytes) else owner.nbytes)
        return put(buffer, offset, payload, *count)

    monkeypatch.setattr(CpuGradient, "put", watching)
    frames = [
        pb.AttachRequest(chunk=tensor_pb2.Chunk(offset=offset, count=1), payload=bytes(4), padding=bytes(1 << 20))
        for offset in range(8)
    ]
    opening = pb.AttachRequest(begin=step_pb2.StepBegin(step=2))
    live.attach(opening, *frames, live.frame(8, commit=True))
    assert max(kept) < 4096
