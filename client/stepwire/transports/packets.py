"""The packet lane: a stream's messages as datagrams, between a client and a server on one host.

A step over gRPC wakes four threads besides the two that work on it. On a lane each side sends a datagram and waits for
one. The stream stays open as the hold of the worker. Whatever ends the stream ends the lane, and the stream has the
status: so errors, deadlines and cancellation are those of a stream.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import socket
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from stepwire.connection.retry import Deadline
from stepwire.connection.stream import AttachedStream, deadline_passed
from stepwire.errors import UnavailableError
from stepwire.transports.handoff import handed_over
from stepwire.transports.host.memory import DESCRIPTORS, SharedMemory
from stepwire.transports.spin import Spin, spin_microseconds
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import transport_pb2
from stepwire.wire.frames import Frame, read_frame
from stepwire.wire.packets import REPLY_BYTES

__all__ = ["NO_SIGNAL", "PacketLane", "fetch_lane", "is_end"]

_OVER_STREAM: Final = pb.AttachRequest(over_stream=True).SerializeToString()
NO_SIGNAL: Final[int] = getattr(socket, "MSG_NOSIGNAL", 0)
"""The flags of a sending: a server that has gone is no signal."""

_ENDS: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF, errno.ESHUTDOWN})
_BOUND_SECONDS: Final = 1e-3
_LONGEST_SECONDS: Final = float(1 << 30)

_open: weakref.WeakSet[PacketLane] = weakref.WeakSet()


class PacketLane:
    """The client's end of one lane. Closes twice without complaint.

    Attributes:
        put: sends one message, with `NO_SIGNAL`; an error that `is_end` at the end of the lane. It is C in one piece,
            and never waits.
    """

    def __init__(self, end: socket.socket, stream: AttachedStream) -> None:
        """Own a socket from now on, for the messages of a stream."""
        self._end = end
        self._stream = stream
        self.put = end.send
        self._bound_seconds = -1.0
        waits = select.poll()
        waits.register(end, select.POLLIN)
        moment = spin_microseconds()
        self._spin, self._is_ready = Spin(moment) if moment else None, functools.partial(waits.poll, 0)
        self._unread: bytes | None = None
        self._lock = threading.Lock()  # no descriptor is shut down after its number belongs to another socket
        self._received = np.empty(REPLY_BYTES + 1, np.uint8).data  # whose pages exist from their first use on
        self._close = weakref.finalize(self, end.close)  # also when nobody closes it: its session was dropped
        _open.add(self)

    def exchange(self, messages: Iterable[bytes], deadline: Deadline) -> Iterator[Frame]:
        """Send messages and yield the replies for as long as the caller asks.

        Raises:
            StepwireError: the server's refusal, a broken connection, or the deadline.
        """
        with deadline.within(self.end_waits):
            self.send(messages)
            while True:
                yield read_frame(pb.AttachResponse, self._receive(deadline))

    def send(self, messages: Iterable[bytes]) -> None:
        """Send more messages within an exchange. A server that has gone shows itself at the next reply."""
        for message in messages:
            try:
                self.put(message, NO_SIGNAL)
            except OSError as error:
                if not is_end(error):
                    raise
                return

    def announce(self) -> None:
        """Tell the server that the next step comes over the stream."""
        self.send([_OVER_STREAM])

    def receive(self, seconds: float) -> bytes | None:
        """Wait for the next message, and return it: no bytes at the end of the lane, None if none came in time.

        Handlers of signals run meanwhile. However often they do, the time is that of the whole wait.
        """
        if (unread := self._unread) is not None:
            self._unread = None
            return unread
        if self._spin is not None:
            self._spin.wait(self._is_ready)
        try:
            self._bound(seconds)
            return bytes(self._received[: self._end.recv_into(self._received)])
        except TimeoutError as error:
            if not _is_timeout(error):
                raise
            return None
        except OSError as error:  # the server has ended the lane, and left messages unread; or it is closed
            if not is_end(error):
                raise
            return b""

    def _bound(self, seconds: float) -> None:
        """Bound the waits; most steps have the bound of the step before, within a millisecond."""
        if not seconds <= self._bound_seconds <= seconds + _BOUND_SECONDS:
            self._bound_seconds = min(seconds, _LONGEST_SECONDS) + _BOUND_SECONDS / 2
            self._end.settimeout(self._bound_seconds)

    def give_back(self, message: bytes) -> None:
        """Have a message received again."""
        self._unread = message

    def close(self) -> None:
        """Close the lane; the stream stays."""
        self.end_waits()
        with self._lock:
            self._close()

    def forked(self) -> None:
        """Leave the lane to the parent, in a child."""
        self._lock = threading.Lock()
        self._close()

    def _receive(self, deadline: Deadline) -> bytes:
        if (message := self.receive(deadline.remaining())) is None:
            raise deadline_passed(deadline)
        if not message:
            raise self._stream.ended(deadline)
        if len(message) > REPLY_BYTES:
            raise UnavailableError(f"a packet of the server has more than {REPLY_BYTES} bytes; attach again")
        return message

    def end_waits(self) -> None:
        """End the wait of another thread."""
        with self._lock, contextlib.suppress(OSError):  # closed meanwhile
            self._end.shutdown(socket.SHUT_RDWR)


def is_end(error: OSError) -> bool:
    """Tell that an error is a socket's, at the end of its lane. The handler of a signal may raise an OSError, too."""
    return error.errno in _ENDS


def _is_timeout(error: TimeoutError) -> bool:
    """Tell that the wait itself was over. The handler of a signal, or another thread, may raise such an error, too."""
    return error.args == ("timed out",) and error.__traceback__ is not None and error.__traceback__.tb_next is None


def _after_fork() -> None:
    for lane in list(_open):  # in a child: the lane stays the parent's, and its lock may be held by another thread
        lane.forked()


os.register_at_fork(after_in_child=_after_fork)


def fetch_lane(
    handoff: transport_pb2.Handoff, size: int, timeout_seconds: float, stream: AttachedStream, access_token: str = ""
) -> tuple[PacketLane, SharedMemory | None]:
    """Fetch the lane of a stream, and the memory beside it if the server has some.

    Args:
        handoff: the handoff of `AttachOpened`.
        size: elements of the flat space.
        timeout_seconds: the time for everything; at most some seconds are used.
        stream: the stream.
        access_token: the token that the stream was attached with; empty for none.

    Raises:
        StepwireError: the server refused, cannot be reached, or sent something else than it says.
    """
    with_memory = handoff.gradient_bytes > 0
    with handed_over(handoff, timeout_seconds, 1 + (DESCRIPTORS if with_memory else 0), access_token) as handed:
        memory = SharedMemory.mapped(handed, handoff, size) if with_memory else None
        if memory is None:
            handed.connection.close()
        return PacketLane(socket.socket(fileno=os.dup(handed.descriptors[-1])), stream), memory
