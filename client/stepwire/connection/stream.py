"""One attached stream, from its opening to its end. A broken stream is thrown away, never mended."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Protocol

import grpc

from stepwire.connection.calls import StreamCall, open_call
from stepwire.connection.errands import later
from stepwire.connection.retry import Deadline
from stepwire.connection.watchdog import Watchdog
from stepwire.errors import DeadlineExceededError, Reason, StepwireError, UnavailableError
from stepwire.lifetimes.forks import Birthplace, forks
from stepwire.v1 import attach_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.error_details import error_from_call
from stepwire.wire.frames import Frame, read_frame

__all__ = ["AttachedStream", "Carrier", "deadline_passed"]


class Carrier(Protocol):
    """The way of a stream's messages: the stream itself, or another one beside it."""

    def exchange(self, messages: Iterable[bytes], deadline: Deadline) -> Iterator[Frame]:
        """See `AttachedStream.exchange`."""
        ...

    def send(self, messages: Iterable[bytes]) -> None:
        """See `AttachedStream.send`."""
        ...


class AttachedStream:
    """A stream attached to a session's worker.

    Attributes:
        opened: the server's first message.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        opening: attach_pb2.AttachOpen,
        deadline: Deadline,
        metadata: tuple[tuple[str, str], ...] = (),
        *,
        direct: bool = True,
    ) -> None:
        """Attach.

        Args:
            channel: the channel.
            opening: the first message.
            deadline: the deadline of the opening.
            metadata: the metadata of the call.
            direct: the stream's messages are short; see `calls.open_call`.

        Raises:
            StepwireError: the server refused, or could not be reached before the deadline.
        """
        self._forks = forks.count
        self._call = open_call(channel, metadata, direct=direct)
        self._watchdog = Watchdog(self._call.cancel)
        # The threads end with the call, also when nobody closes the stream: the channel was closed, or is gone.
        self._call.on_end(self._watchdog.close)
        # The call ends with the stream, also when nobody closes it: its session was dropped. Nothing that lives as long
        # as the call refers to the stream. The stream may be collected in any thread, so another thread ends the call.
        self._birthplace = Birthplace()
        end = functools.partial(_end, self._watchdog, self._call, self._birthplace)
        weakref.finalize(self, later, end).atexit = False
        try:
            first = next(self.exchange([pb.AttachRequest(open=opening).SerializeToString()], deadline))
        except BaseException:
            self.close()
            raise
        self.opened: attach_pb2.AttachOpened = first.message.opened

    @property
    def is_cut(self) -> bool:
        """Tell whether a fork of the process has cut the stream."""
        return self._forks != forks.count

    def exchange(self, messages: Iterable[bytes], deadline: Deadline) -> Iterator[Frame]:
        """Send messages and yield the replies for as long as the caller asks.

        Raises:
            StepwireError: the server's refusal, a broken connection, or the deadline.
        """
        self._watchdog.arm(deadline.remaining())
        if self._watchdog.barked:  # as the step before ended: too late for that one, and no fault of this one
            raise UnavailableError("the stream was cancelled between two steps; attach again")
        self._call.put(messages)
        cancel = self._call.cancel
        try:
            deadline.enter(cancel)
            while True:
                yield read_frame(pb.AttachResponse, self._receive(deadline))
        finally:
            deadline.leave(cancel)
            self._watchdog.disarm()

    def send(self, messages: Iterable[bytes]) -> None:
        """Send more messages within an exchange."""
        self._call.put(messages)

    def ended(self, deadline: Deadline) -> StepwireError:
        """Send nothing more, and return the error that the server ends the stream with."""
        self._call.half_close()
        try:
            for _ in self.exchange((), deadline):
                self.close()
        except StepwireError as error:
            return error
        raise AssertionError("an exchange ends with an error")

    def close(self) -> None:
        """End the stream, letting the server finish what was sent. Closing twice is harmless."""
        _end(self._watchdog, self._call, self._birthplace)

    def _receive(self, deadline: Deadline) -> bytes:
        try:
            return self._call.receive()
        except StopIteration:
            raise UnavailableError("the server ended the stream", reason=Reason.UNREACHABLE) from None
        except grpc.RpcError as error:
            raise self._translated(error, deadline) from None

    def _translated(self, error: grpc.RpcError, deadline: Deadline) -> StepwireError:
        failure = error_from_call(error)
        if self._watchdog.barked:
            return deadline_passed(deadline)
        return failure


def deadline_passed(deadline: Deadline) -> DeadlineExceededError:
    """Return the error of a step whose reply did not come in time."""
    return DeadlineExceededError(
        f"no reply within {deadline.timeout_seconds} s; the step may have been applied: send it again with the same "
        "gradients, or with a longer timeout",
        metadata={"timeout_seconds": deadline.timeout_seconds},
    )


def _end(watchdog: Watchdog, call: StreamCall, birthplace: Birthplace) -> None:
    """End a stream, unless a forked child has dropped the stream of its parent."""
    if birthplace.is_here:
        watchdog.close()
        call.close()
