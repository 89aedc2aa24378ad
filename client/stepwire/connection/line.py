"""The channel behind one client's calls, opened again after a fork of the process.

gRPC has threads that hold locks. A child that is forked meanwhile hangs now and then, and gRPC says so on standard
error. So every channel is closed before a fork, in the parent, and its threads end. Calls that were under way are
repeated, as after any broken connection. One channel that never connects stays: with the last one gRPC's core would
shut down in a thread of its own, in the middle of the fork.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

import grpc

from stepwire.errors import Reason, UnavailableError
from stepwire.lifetimes.endings import ENDINGS
from stepwire.lifetimes.forks import Birthplace, forks

__all__ = ["Line"]

_core_channel = grpc.insecure_channel  # also where a test has put another one in its place
_REMEDY = "connect anew in the child, or make the session or the optimizer there"


class Line:
    """One channel, or none just now. Thread-safe; closes twice without complaint."""

    def __init__(self, open_channel: Callable[[], grpc.Channel]) -> None:
        """Open the channel."""
        self._open_channel = open_channel
        self._closed = False
        self._birthplace = Birthplace()
        self._channel: grpc.Channel | None = None
        _lines.add(self)
        self.open()

    @property
    def channel(self) -> grpc.Channel:
        """The channel, opened if there is none.

        Raises:
            InvalidRequestError: this is a forked child of the process that made the line.
            ValueError: the line is closed.
        """
        self._birthplace.check("client", _REMEDY)
        return self._channel or self.open()

    def open(self) -> grpc.Channel:
        """Open the channel, if there is none, and return it; not in the middle of a fork.

        Raises:
            ValueError: the line is closed.
        """
        with _gate.lock:
            if self._closed:
                raise ValueError("the client is closed, and makes no more calls")
            _gate.enter()
            if (channel := self._channel) is None:
                self._channel = channel = self._open_channel()
            return channel

    def close(self) -> None:
        """Close the channel for good."""
        if self._birthplace.is_here:
            with _gate.lock:
                self._closed = True
            self.rest()

    def rest(self) -> None:
        """Close the channel; the next call opens another one."""
        if (channel := self.parted()) is not None:
            channel.close()

    def parted(self) -> grpc.Channel | None:
        """Return the channel, for the caller to close, and have none from now on."""
        channel, self._channel = self._channel, None
        return channel

    def broken(self, error: ValueError) -> UnavailableError | ValueError:
        """Return the error of a call whose channel was closed under it: that of a broken connection, after a fork."""
        if self._closed or not str(error).startswith("Cannot invoke RPC"):
            return error
        return UnavailableError("the connection was closed while the process forked", reason=Reason.UNREACHABLE)


class _Gate:
    """The entrance to gRPC, closed during a fork."""

    def __init__(self) -> None:
        self._core: grpc.Channel | None = None
        self._ends = False
        self.lock = threading.RLock()

    def enter(self) -> None:
        """Keep gRPC's core with a channel that never connects, and have all lines rest at the end of the process."""
        if self._core is None:
            self._core = _core_channel("unix:/stepwire/no/server")
        if not self._ends:  # before any session exists, so it is the last end
            self._ends = True
            ENDINGS.with_owner(self, _rest_all)

    def close(self) -> None:
        self.lock.acquire()
        channels = [channel for line in list(_lines) if (channel := line.parted()) is not None]
        forks.note()  # so whoever meets a channel that was closed for the fork knows of the fork
        for channel in channels:
            channel.close()

    def open(self) -> None:
        self.lock.release()

    def forget(self) -> None:
        """Begin anew in a child: the lock is held by its parent's thread."""
        self.lock = threading.RLock()
        self._ends = False


def _rest_all(seconds: float) -> None:
    for line in list(_lines):
        line.rest()


_lines: weakref.WeakSet[Line] = weakref.WeakSet()
_gate = _Gate()
os.register_at_fork(before=_gate.close, after_in_parent=_gate.open, after_in_child=_gate.forget)
