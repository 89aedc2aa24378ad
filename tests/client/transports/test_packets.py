"""The client's end of a packet lane, against an end that the test holds."""

from __future__ import annotations

import gc
import math
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from stepwire.connection.retry import Deadline
from stepwire.errors import DeadlineExceededError, FencedError, InvalidRequestError, UnavailableError
from stepwire.transports.handoff import bound_waits
from stepwire.transports.packets import PacketLane
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire.wire.packets import REPLY_BYTES

RESULT = pb.AttachResponse(result=step_pb2.StepResult(step=7)).SerializeToString()


class EndedStream:
    """A stream that ends with one error."""

    def ended(self, deadline: Deadline) -> FencedError:
        return FencedError("worker 0 is held by another client")


@pytest.fixture
def pair() -> Iterator[tuple[PacketLane, socket.socket]]:
    """A lane, and the server's end of it."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * REPLY_BYTES)
    lane = PacketLane(own, EndedStream())  # type: ignore[arg-type]
    with other:
        yield lane, other
    lane.close()


def reply(lane: PacketLane, seconds: float = 30.0, *messages: bytes) -> Any:
    return next(lane.exchange(messages or [b"x"], Deadline(seconds))).message


def test_messages_keep_their_borders(pair: tuple[PacketLane, socket.socket]) -> None:
    lane, other = pair
    other.send(RESULT)
    assert reply(lane, 30.0, b"one", b"two").result.step == 7
    lane.announce()
    assert [other.recv(100) for _ in range(3)] == [
        b"one",
        b"two",
        pb.AttachRequest(over_stream=True).SerializeToString(),
    ]


def test_no_reply_in_time_is_the_deadline_of_a_stream(pair: tuple[PacketLane, socket.socket]) -> None:
    lane, other = pair
    with pytest.raises(DeadlineExceededError, match=r"no reply within 0\.001 s; the step may have been applied"):
        reply(lane, 0.001)
    other.send(RESULT)
    assert reply(lane).result.step == 7, "the next deadline is its own"


@pytest.mark.parametrize("end", ["closed", "shut down", "left unread", "closed here"])
def test_a_lane_that_has_ended_has_its_reason_from_the_stream(pair: tuple[PacketLane, socket.socket], end: str) -> None:
    lane, other = pair
    if end == "left unread":
        lane.send([b"unread"])
    if end == "closed here":  # by another thread, at the end of the process
        lane.close()
    elif end == "shut down":
        other.shutdown(socket.SHUT_RDWR)
    else:
        other.close()
    with pytest.raises(FencedError, match="held by another client"):
        reply(lane)


def test_packets_that_no_server_sends_are_refused(pair: tuple[PacketLane, socket.socket]) -> None:
    lane, other = pair
    other.send(bytes(REPLY_BYTES + 1))
    with pytest.raises(UnavailableError, match=f"more than {REPLY_BYTES} bytes"):
        reply(lane)
    other.send(b"\xff" * 30)
    with pytest.raises(InvalidRequestError, match="cannot be decoded"):
        reply(lane)


def test_a_call_that_is_ended_waits_no_longer(pair: tuple[PacketLane, socket.socket]) -> None:
    deadline = Deadline(30.0)
    deadline.end()
    with pytest.raises(FencedError):
        next(pair[0].exchange([b"x"], deadline))


def test_nobody_has_to_close_a_lane() -> None:
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        lane = PacketLane(own, EndedStream())  # type: ignore[arg-type]
        lane.close()
        lane.close()
        del lane, own
        gc.collect(0)
        assert other.recv(1) == b""


@pytest.mark.parametrize(
    ("seconds", "whole", "micros"),
    [(0.0, 0, 1), (1e-9, 0, 1), (0.25, 0, 250_000), (5.5, 5, 500_000), (math.inf, 1 << 30, 0)],
)
def test_waits_are_bounded_by_the_kernel(seconds: float, whole: int, micros: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        bound_waits(end, seconds)
        told = struct.unpack("@ll", end.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))
        assert told[0] == whole or whole == 1 << 30 and told[0] > 1 << 20
        assert told[1] == pytest.approx(micros, abs=4000), "the kernel counts in jiffies"
