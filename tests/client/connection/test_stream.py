"""One attached stream against a server that plays along, ends, refuses, or keeps silent."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

import stepwire
from stepwire.connection.channel import Calls
from stepwire.connection.retry import Deadline
from stepwire.connection.stream import AttachedStream
from stepwire.v1 import attach_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.error_details import status_of

PATIENCE_SECONDS = 120.0
OPENED = pb.AttachResponse(opened=attach_pb2.AttachOpened(attach_token=3, epoch=1, applied_step=8)).SerializeToString()


def result(step: int) -> bytes:
    return pb.AttachResponse(result=step_pb2.StepResult(step=step)).SerializeToString()


@pytest.fixture(autouse=True, params=[True, False], ids=["direct", "threaded"])
def is_direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each test twice: over a call without threads in between, and over gRPC's own stream."""
    monkeypatch.setattr(AttachedStream.__init__, "__kwdefaults__", {"direct": request.param})


def attach(calls: Calls, seconds: float = PATIENCE_SECONDS) -> AttachedStream:
    return AttachedStream(calls.channel, attach_pb2.AttachOpen(session_id="s", attach_token=3), Deadline(seconds))


def echoing(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """Answer the opening, then each message with a result whose step is the message's length."""
    next(messages)
    yield OPENED
    for message in messages:
        yield result(len(message))


def test_the_opening_is_the_first_message_and_its_answer_is_kept(scripted: Any, scripted_calls: Calls) -> None:
    seen: list[bytes] = []

    def behavior(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        seen.append(next(messages))
        yield OPENED
        yield from (message for message in messages)

    scripted.on("Attach", behavior)
    stream = attach(scripted_calls)
    stream.close()
    assert pb.AttachRequest.FromString(seen[0]) == pb.AttachRequest(
        open=attach_pb2.AttachOpen(session_id="s", attach_token=3)
    )
    assert (stream.opened.attach_token, stream.opened.applied_step) == (3, 8)


def test_exchanges_follow_each_other_on_one_stream(scripted: Any, scripted_calls: Calls) -> None:
    scripted.on("Attach", echoing)
    stream = attach(scripted_calls)
    for length in (1, 5, 3):
        frame = next(stream.exchange([b"x" * length], Deadline(PATIENCE_SECONDS)))
        assert frame.message.result.step == length
    stream.close()


def test_messages_are_made_as_they_are_sent(scripted: Any, scripted_calls: Calls) -> None:
    """Waiting for an answer to the second message before the third is made would deadlock if all were made first."""
    scripted.on("Attach", echoing)
    stream, answered = attach(scripted_calls), threading.Event()

    def messages() -> Iterator[bytes]:
        yield b"1"
        yield b"22"
        assert answered.wait(PATIENCE_SECONDS)
        yield b"333"

    answers = stream.exchange(messages(), Deadline(PATIENCE_SECONDS))
    assert [next(answers).message.result.step for _ in range(2)] == [1, 2]
    answered.set()
    assert next(answers).message.result.step == 3
    stream.close()


def test_a_refusal_keeps_its_class_and_values(scripted: Any, scripted_calls: Calls) -> None:
    def refusing(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(messages)
        yield OPENED
        next(messages)
        context.abort_with_status(status_of(stepwire.StepMismatchError("gap", metadata={"expected_step": 9})))

    scripted.on("Attach", refusing)
    stream = attach(scripted_calls)
    with pytest.raises(stepwire.StepMismatchError) as refused:
        next(stream.exchange([b"x"], Deadline(PATIENCE_SECONDS)))
    assert refused.value.metadata == {"expected_step": "9"}
    stream.close()


def test_a_refused_opening_leaves_no_stream_behind(scripted: Any, scripted_calls: Calls) -> None:
    def refusing(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.abort_with_status(status_of(stepwire.FencedError("taken")))
        yield b""

    scripted.on("Attach", refusing)
    with pytest.raises(stepwire.FencedError):
        attach(scripted_calls)
    for thread in threading.enumerate():
        if thread.name == "stepwire-watchdog":
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()


def test_a_stream_that_the_server_ends_is_unavailable(scripted: Any, scripted_calls: Calls) -> None:
    scripted.on("Attach", lambda messages, context: iter([OPENED]))
    stream = attach(scripted_calls)
    with pytest.raises(stepwire.UnavailableError, match="the server ended the stream"):
        next(stream.exchange([b"x"], Deadline(PATIENCE_SECONDS)))
    stream.close()


def test_garbage_from_the_server_is_an_invalid_frame(scripted: Any, scripted_calls: Calls) -> None:
    def garbling(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(messages)
        yield OPENED
        next(messages)
        yield b"\xff\xff"

    scripted.on("Attach", garbling)
    stream = attach(scripted_calls)
    with pytest.raises(stepwire.InvalidRequestError) as failed:
        next(stream.exchange([b"x"], Deadline(PATIENCE_SECONDS)))
    assert failed.value.reason is stepwire.Reason.INVALID_FRAME
    stream.close()


def test_silence_ends_with_the_deadline(scripted: Any, scripted_calls: Calls) -> None:
    def silent(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(messages)
        yield OPENED
        scripted.released.wait(PATIENCE_SECONDS)

    scripted.on("Attach", silent)
    stream = attach(scripted_calls)
    with pytest.raises(stepwire.DeadlineExceededError, match=r"no reply within 0\.02 s") as failed:
        next(stream.exchange([b"x"], Deadline(0.02)))
    assert failed.value.metadata == {"timeout_seconds": "0.02"}
    stream.close()


def test_closing_twice_is_harmless_and_ends_the_call(scripted: Any, scripted_calls: Calls) -> None:
    over = threading.Event()

    def behavior(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(over.set)
        yield from echoing(messages, context)

    scripted.on("Attach", behavior)
    stream = attach(scripted_calls)
    stream.close()
    stream.close()
    assert over.wait(PATIENCE_SECONDS)


def test_a_dropped_stream_ends_its_call_and_its_threads(scripted: Any, scripted_calls: Calls) -> None:
    over = threading.Event()

    def behavior(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(over.set)
        yield from echoing(messages, context)

    scripted.on("Attach", behavior)
    before = set(threading.enumerate())
    stream = attach(scripted_calls)
    next(stream.exchange([b"x"], Deadline(PATIENCE_SECONDS)))
    watchdogs = [each for each in threading.enumerate() if each not in before and each.name == "stepwire-watchdog"]
    assert len(watchdogs) == 1
    del stream
    gc.collect()
    assert over.wait(PATIENCE_SECONDS)
    watchdogs[0].join(PATIENCE_SECONDS)
    assert not watchdogs[0].is_alive()
