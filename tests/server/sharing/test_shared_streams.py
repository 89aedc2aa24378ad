"""Streams with shared memory, from a client in raw messages: grants, refusals, and the state after them."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2, tensor_pb2, transport_pb2
from stepwire_server.server import Server
from tests.support.raw_handoff import Fetched, fetch, held_by_process

SHM, GRPC = transport_pb2.TRANSPORT_SHM, transport_pb2.TRANSPORT_GRPC


class SharedStream:
    """An attached stream and the memory that it shares. A context manager."""

    def __init__(self, live: Any, **opening: Any) -> None:
        self.live = live
        self.stream = live.wire.open()
        self.stream.send(live.opening(**{"transport": SHM} | opening))
        self.opened = self.reply().opened
        self.handoff = self.opened.handoff
        live.token = self.opened.attach_token
        self.memory: Fetched | None = None

    def fetch(self) -> Fetched:
        self.memory = Fetched(fetch(self.handoff.socket, transport_pb2.HandoffRequest(token=self.handoff.token)))
        return self.memory

    def reply(self) -> pb.AttachResponse:
        return pb.AttachResponse.FromString(self.stream.receive())

    def step(self, step: int, gradient: np.ndarray, **begin: Any) -> step_pb2.StepResult:
        assert self.memory is not None
        data = gradient.tobytes()
        self.memory.gradient[: len(data)] = np.frombuffer(data, np.uint8)
        self.stream.send(shared_step(step, **begin))
        reply = self.reply()
        assert [field.name for field, _ in reply.ListFields()] == ["result"]
        return reply.result

    def parameters(self, dtype: Any = np.float32) -> np.ndarray:
        assert self.memory is not None
        return self.memory.parameters.view(dtype)[: self.live.size]

    def __enter__(self) -> SharedStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.cancel()
        if self.memory is not None:
            self.memory.close()


def shared_step(step: int, **begin: Any) -> pb.AttachRequest:
    return pb.AttachRequest(
        begin=step_pb2.StepBegin(step=step, in_shared_memory=True, **begin), commit=step_pb2.StepCommit()
    )


@pytest.fixture
def twin(wire: Any, live: Any, make_config: Callable[..., Any], make_live: Any) -> Any:
    """A session like `live`, with the same history."""
    config = live.wire.get(live.id).config
    config.ClearField("device")
    other = make_live(wire, wire.create(config))
    other.load(other.load_opening(1), other.load_chunk(commit=True))
    other.step(1)
    return other


def test_memory_is_granted_as_the_handoff_describes_it(live: Any) -> None:
    with SharedStream(live) as shared:
        opened, handoff = shared.opened, shared.handoff
        assert (opened.transport, opened.transport_reason, opened.applied_step) == (SHM, "", 1)
        assert (handoff.gradient_dtype, handoff.reply_dtype) == (1, 1)
        memory = shared.fetch()
        sizes = [os.fstat(descriptor).st_size for descriptor in memory.descriptors]
        assert sizes == [handoff.gradient_bytes, handoff.parameter_bytes] == [4096, 4096]
        assert memory.seals() == [0x7, 0x17]
        assert not memory.gradient.any()
        values = np.frombuffer(live.wire.pull(live.id, "param")[1]["param"], np.float32)
        np.testing.assert_array_equal(shared.parameters(), values)


def test_steps_in_shared_memory_and_in_messages_alternate_on_one_stream(live: Any, twin: Any) -> None:
    with SharedStream(live) as shared:
        shared.fetch()
        for step in range(2, 30):
            expected = twin.attach(twin.frame(begin=step, commit=True, payload=twin.gradient(step)))
            if step % 3:
                result = shared.step(step, live.gradient(step))
            else:
                shared.stream.send(live.frame(begin=step, commit=True, payload=live.gradient(step)))
                reply = shared.reply()
                assert reply.payload == expected[-1].payload
                result = reply.result
            assert (result.step, result.telemetry.grad_norm) == (step, expected[-1].result.telemetry.grad_norm)
            assert shared.parameters().tobytes() == expected[-1].payload
    assert live.wire.pull(live.id, "param", "exp_avg", "exp_avg_sq") == twin.wire.pull(
        twin.id, "param", "exp_avg", "exp_avg_sq"
    )


def test_both_sides_check_that_they_see_the_same_memory(live: Any, refusal: Any) -> None:
    pattern = bytes(range(100, 164))
    with SharedStream(live) as shared:
        memory = shared.fetch()
        memory.gradient[:64] = np.frombuffer(pattern, np.uint8)
        shared.stream.send(pb.AttachRequest(check=transport_pb2.MemoryCheck(pattern=pattern)))
        assert shared.reply().checked.parameters == memory.parameters[:64].tobytes()
        assert shared.step(2, live.gradient(2)).step == 2
        shared.stream.send(pb.AttachRequest(check=transport_pb2.MemoryCheck(pattern=pattern)))
        with pytest.raises(Exception, match="before the first step"):
            shared.reply()


@pytest.mark.parametrize("pattern", [b"", b"x" * 15, b"x" * 18, b"x" * 68, b"x" * 64])
def test_a_pattern_that_is_none_or_is_not_there_ends_the_stream(live: Any, pattern: bytes) -> None:
    with SharedStream(live) as shared:
        shared.stream.send(pb.AttachRequest(check=transport_pb2.MemoryCheck(pattern=pattern)))
        with pytest.raises(Exception, match=r"check\.pattern"):
            shared.reply()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (shared_step(2, gradient_dtype=2), "begin.gradient_dtype"),
        (shared_step(2, reply={"dtype": 2}), "begin.reply.dtype"),
        (shared_step(2, overlap=True), "begin.overlap"),
        (shared_step(2, reply={"dtype": 2, "mode": step_pb2.REPLY_MODE_CHANGED}), "begin.reply.dtype"),
        (
            pb.AttachRequest(
                begin=step_pb2.StepBegin(step=2, in_shared_memory=True),
                chunk=tensor_pb2.Chunk(count=1),
                payload=b"1234",
            ),
            "chunk",
        ),
        (pb.AttachRequest(check=transport_pb2.MemoryCheck(pattern=bytes(16)), payload=b"1"), "check"),
    ],
)
def test_what_does_not_lie_in_shared_memory_is_refused(live: Any, message: pb.AttachRequest, field: str) -> None:
    before = live.fingerprint()
    with SharedStream(live) as shared:
        shared.fetch()
        shared.stream.send(message)
        with pytest.raises(Exception) as refused:
            shared.reply()
    assert (refused.value.code, refused.value.metadata) == (  # type: ignore[attr-defined]
        "INVALID_ARGUMENT",
        {"field": field},
    )
    assert live.fingerprint() == before


@pytest.mark.parametrize("message", [shared_step(2), pb.AttachRequest(check={"pattern": bytes(16)})])
def test_a_stream_without_memory_refuses_what_needs_it(live: Any, untouched: Any, message: Any) -> None:
    with pytest.raises(Exception, match="shares no memory"):
        live.attach(message)


def test_a_call_shares_no_memory(live: Any, untouched: Any) -> None:
    request = live.unary_step(2, begin=step_pb2.StepBegin(step=2, in_shared_memory=True))
    with pytest.raises(Exception, match="attach a stream"):
        live.wire.unary("Step", request)


def test_reserved_bytes_and_descriptors_come_back_when_the_stream_ends(live: Any, until: Any) -> None:
    reserved = live.wire.reserved_bytes()
    with SharedStream(live) as shared:
        shared.fetch()
        assert live.wire.reserved_bytes() == reserved + 4096
    until(lambda: live.wire.reserved_bytes() == reserved)


def test_a_token_dies_with_its_stream_and_with_its_first_use(live: Any, until: Any) -> None:
    with SharedStream(live) as shared:
        shared.fetch()
        request = transport_pb2.HandoffRequest(token=shared.handoff.token)
        with fetch(shared.handoff.socket, request) as again:
            assert (again.refused, again.descriptors) == (16, [])
    with SharedStream(live) as shared:
        assert shared.handoff.token != request.token
    until(lambda: not live.wire.get(live.id).attached)
    with fetch(shared.handoff.socket, transport_pb2.HandoffRequest(token=shared.handoff.token)) as late:
        assert (late.refused, late.descriptors) == (16, [])


def test_a_second_client_gets_memory_of_its_own_and_the_first_is_fenced(live: Any) -> None:
    with SharedStream(live) as first:
        first.fetch()
        first.step(2, live.gradient(2))
        with SharedStream(live, attach_token=0) as second:
            memory = second.fetch()
            assert not memory.gradient.any()
            assert second.opened.attach_token not in (0, first.opened.attach_token)
            second.step(3, live.gradient(3))
            first.stream.send(shared_step(4))
            with pytest.raises(Exception) as refused:
                first.reply()
            assert refused.value.reason == "FENCED"  # type: ignore[attr-defined]
            assert second.step(4, live.gradient(4)).step == 4
            np.testing.assert_array_equal(first.parameters(), second.parameters())  # the state itself


def test_a_session_that_ends_under_its_stream_leaves_memory_that_can_be_touched(live: Any) -> None:
    with SharedStream(live) as shared:
        memory = shared.fetch()
        live.wire.unary("DeleteSession", pb.DeleteSessionRequest(session_id=live.id))
        memory.gradient[:] = 1
        assert memory.parameters.any()
        shared.stream.send(shared_step(2))
        with pytest.raises(Exception) as refused:
            shared.reply()
        assert refused.value.reason == "SESSION_NOT_FOUND"  # type: ignore[attr-defined]


def test_both_halves_of_a_commit_are_of_the_gradient_in_memory(
    wire: Any, make_config: Callable[..., Any], make_live: Any
) -> None:
    lives = []
    for _ in range(2):
        config = make_config((300,))
        config.gradient.two_phase = True
        lives.append(make_live(wire, wire.create(config)))
    gradient = lives[0].gradient(1)
    half = pb.AttachRequest(commit=step_pb2.StepCommit(clip_coefficient=0.5))
    plain = lives[1].attach(lives[1].frame(begin=1, commit=True, payload=gradient), half)
    with SharedStream(lives[0]) as shared:
        memory = shared.fetch()
        memory.gradient[:1200] = np.frombuffer(gradient.tobytes(), np.uint8)
        shared.stream.send(shared_step(1))
        first = shared.reply()
        assert first.HasField("gradient_check")
        assert first.gradient_check == plain[0].gradient_check
        shared.stream.send(half)
        assert shared.reply().result.telemetry.clip_coefficient == 0.5
        assert shared.parameters().tobytes() == plain[-1].payload


# --- no shared memory -----------------------------------------------------------------------------------


def fallback(live: Any, transport: int = SHM) -> str:
    """Attach and return the reason for no memory; a step in messages is applied all the same."""
    step = live.wire.get(live.id).applied_step + 1
    replies = live.wire.stream(
        "Attach", [live.opening(transport=transport), live.frame(begin=step, commit=True, payload=live.gradient(step))]
    )
    live.attached(replies[0])
    opened, last = map(pb.AttachResponse.FromString, replies)
    assert (opened.opened.transport, opened.opened.HasField("handoff")) == (GRPC, False)
    assert last.result.step == step
    return opened.opened.transport_reason


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("host.sealed_memory.os.memfd_create", errno.EMFILE),
        ("host.sealed_memory.os.posix_fallocate", errno.ENOSPC),
        ("host.sealed_memory.mmap.mmap", errno.ENOMEM),
        ("host.sealed_memory.fcntl.fcntl", errno.EINVAL),
        ("sharing.offer.os.listdir", errno.ENOENT),
    ],
)
def test_a_system_that_has_none_leads_to_messages(
    live: Any, call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    reserved = live.wire.reserved_bytes()
    monkeypatch.setattr(f"stepwire_server.{call}", refuse)
    assert os.strerror(number) in fallback(live)
    assert live.wire.reserved_bytes() == reserved


def test_descriptors_are_kept_for_connections(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwire_server.sharing.offer.resource.getrlimit", lambda _: (16, 16))
    assert "raise `ulimit -n`" in fallback(live)


def test_a_budget_that_has_none_leads_to_messages(wire: Any, make_config: Any, make_live: Any, serve: Any) -> None:
    size = 64 << 10
    with serve(memory_budget=16 * size + 100) as server, type(wire)(server.target) as own:
        live = make_live(own, own.create(make_config((size,), reply_dtype=2)))
        assert "the shared memory of the parameters needs" in fallback(live)


def test_a_server_told_to_share_nothing_says_so(make_config: Any, make_live: Any, connect: Any, serve: Any) -> None:
    with serve(shared_memory=False, packets=False) as server, connect(server.target) as own:
        info = own.info()
        assert not {"transport_shm", "transport_packets"} & set(info.features)
        assert (info.local.handoff_socket, info.local.shared_memory_off) == ("", server.handoff.off)
        live = make_live(own, own.create(make_config((3,))))
        assert (
            fallback(live) == server.handoff.off == "shared memory is switched off on this server (--no-shared-memory)"
        )


@pytest.mark.parametrize(
    ("transport", "reason"),
    [(3, "the server's sessions live on no GPU"), (99, "this server does not serve transport 99")],
)
def test_another_transport_falls_back_and_says_why(live: Any, transport: int, reason: str) -> None:
    assert fallback(live, transport) == reason


def test_a_server_that_shares_tells_where(server: Server, wire: Any) -> None:
    info = wire.info()
    assert "transport_shm" in info.features
    assert (info.local.handoff_socket, info.local.shared_memory_off) == (server.handoff.path, "")


# --- clients that misbehave --------------------------------------------------------------------------------


def test_a_client_that_scribbles_and_punches_hurts_itself_alone(live: Any, twin: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    before = twin.fingerprint()
    with SharedStream(live) as shared:
        memory = shared.fetch()
        for descriptor in memory.descriptors:
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, 0)
        memory.gradient[:] = 255  # NaN throughout
        shared.stream.send(shared_step(2))
        with pytest.raises(Exception) as refused:
            shared.reply()
        assert refused.value.reason == "NON_FINITE_GRADIENT"  # type: ignore[attr-defined]
    with SharedStream(live) as shared:
        memory = shared.fetch()
        memory.gradient[:] = 1
        assert libc.fallocate(memory.descriptors[0], 3, ctypes.c_long(0), ctypes.c_long(4096)) == 0
        assert libc.fallocate(memory.descriptors[1], 3, ctypes.c_long(0), ctypes.c_long(4096)) == -1
        shared.stream.send(shared_step(2))
        assert shared.reply().result.telemetry.grad_norm == 0.0  # a hole reads as zeros
        assert shared.step(3, live.gradient(3)).step == 3
    assert twin.fingerprint() == before


@pytest.mark.usefixtures("uncollected")
def test_two_hundred_clients_come_and_go_and_leave_nothing(live: Any, server: Server, until: Any) -> None:
    """Some do not fetch, some close first, some step, some vanish in the middle of a step."""
    reserved, streams = live.wire.reserved_bytes(), server.registry.statistics().streams
    mappings = held_by_process()[1]
    step = 1
    for turn in range(200):
        with SharedStream(live, attach_token=0 if turn % 3 else live.token) as shared:
            if turn % 5:
                memory = shared.fetch()
                if turn % 5 == 2:
                    memory.connection.close()
                if turn % 5 == 3:
                    step += 1
                    shared.step(step, live.gradient(step))
                if turn % 5 == 4:
                    shared.stream.send(pb.AttachRequest(begin=step_pb2.StepBegin(step=step + 1, in_shared_memory=True)))
            del shared
        if turn % 5:
            del memory
    until(lambda: live.wire.reserved_bytes() == reserved and server.registry.statistics().streams == streams)
    until(lambda: held_by_process()[1] <= mappings + 1)  # of the parameters, which were moved and stay
    until(lambda: server.handoff.statistics() == (0, 0, 0, True))
    assert live.wire.get(live.id).applied_step == step
