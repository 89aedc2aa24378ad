"""A call without threads in between, against a server that plays along: its messages, its end, and its threads."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from stepwire.connection import direct_call
from stepwire.connection.calls import ThreadedCall, open_call
from stepwire.connection.channel import Calls
from stepwire.connection.direct_call import DirectCall

PATIENCE_SECONDS = 120.0


def echoing(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from messages


@pytest.fixture
def senders() -> Callable[[], list[threading.Thread]]:
    """Return the senders of this test: calls of tests before may not be collected yet."""
    before = set(threading.enumerate())
    return lambda: [each for each in threading.enumerate() if each.name == "stepwire-sender" and each not in before]


@pytest.fixture
def call(scripted: Any, scripted_calls: Calls) -> Iterator[DirectCall]:
    scripted.on("Attach", echoing)
    call = open_call(scripted_calls.channel, (), direct=True)
    assert isinstance(call, DirectCall)
    yield call
    call.close()


def test_messages_that_are_there_need_no_thread(call: DirectCall, senders: Any) -> None:
    for message in (b"a", b"bb", b"ccc"):
        call.put([message])
        assert call.receive() == message
    call.put((b"d", b"e", b"f"))
    assert [call.receive() for _ in range(3)] == [b"d", b"e", b"f"]
    assert senders() == []


def test_messages_that_are_made_are_sent_by_a_thread_and_stay_in_order(call: DirectCall, senders: Any) -> None:
    made = threading.Event()

    def making() -> Iterator[bytes]:
        yield b"1"
        assert made.wait(PATIENCE_SECONDS)
        yield b"2"

    call.put(making())
    assert call.receive() == b"1"
    call.put([b"3"])  # behind those that are not there yet
    made.set()
    assert [call.receive() for _ in range(2)] == [b"2", b"3"]
    (sender,) = senders()
    call.close()
    sender.join(PATIENCE_SECONDS)
    assert not sender.is_alive()


def test_messages_of_both_kinds_by_turns_are_sent_one_at_a_time(call: DirectCall) -> None:
    for turn in range(20):
        call.put([b"%d there" % turn])
        call.put(iter([b"%d made" % turn, b"%d too" % turn]))
        assert [call.receive() for _ in range(3)] == [b"%d %s" % (turn, kind) for kind in (b"there", b"made", b"too")]


def test_a_message_that_cannot_be_made_ends_the_call(call: DirectCall, caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> Iterator[bytes]:
        yield b"1"
        raise RuntimeError("no gradient")

    call.put(failing())
    with pytest.raises(grpc.RpcError) as ended:
        while True:
            call.receive()
    assert ended.value.code() is grpc.StatusCode.CANCELLED
    assert "a message could not be made" in caplog.text


def test_the_end_of_the_messages_ends_the_call_without_an_error(call: DirectCall) -> None:
    call.put([b"a"])
    assert call.receive() == b"a"
    call.half_close()
    for _ in range(2):  # and says so again
        with pytest.raises(StopIteration):
            call.receive()


def test_a_cancel_ends_the_wait_of_another_thread(call: DirectCall) -> None:
    codes = []

    def waiting() -> None:
        with pytest.raises(grpc.RpcError) as ended:
            call.receive()
        codes.append(ended.value.code())

    waiter = threading.Thread(target=waiting)
    waiter.start()
    call.cancel()
    waiter.join(PATIENCE_SECONDS)
    assert codes == [grpc.StatusCode.CANCELLED]


def test_closing_receives_all_events_and_twice_is_harmless(call: DirectCall) -> None:
    call.put([b"a"])
    call.close()
    call.close()
    assert call._due == 0  # of which gRPC would keep the memory as long as the channel
    with pytest.raises(grpc.RpcError):
        call.receive()


def test_a_call_of_a_channel_that_was_closed_has_ended(call: DirectCall, scripted_calls: Calls) -> None:
    scripted_calls.close()
    call.put([b"a"])
    with pytest.raises(grpc.RpcError) as ended:
        call.receive()
    assert ended.value.code() is grpc.StatusCode.CANCELLED


def test_a_grpc_with_other_names_gets_its_own_stream(
    scripted: Any, scripted_calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.on("Attach", echoing)
    monkeypatch.setattr(direct_call, "_core", types.SimpleNamespace())
    call = open_call(scripted_calls.channel, (), direct=True)
    assert isinstance(call, ThreadedCall)
    call.put([b"a"])
    assert call.receive() == b"a"
    call.close()
