"""The loops of compiled lanes: one thread for all lanes whose steps are made by the same kernels, and no interpreter.

A loop is compiled beside the steps that need it, which go their ordinary way until then.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from stepwire_server.engines.cpu.lane_words import (
    BELL,
    EVENT,
    EVENT_WORDS,
    FD,
    ONE,
    OPEN,
    OVER,
    SELF,
    TIME,
    WIDTH,
    WORD,
)
from stepwire_server.engines.protocol import HostArray
from stepwire_server.host.limits import processor_count
from stepwire_server.rules import Recipe

__all__ = ["LaneKernels", "LaneLoop", "LaneLoops", "Seat"]

_log = logging.getLogger(__name__)

_MOST_LOOPS: Final = 16
"""The kinds of steps that have a loop; each costs a thread, and a kernel."""

_MOST_LANES: Final = 4096
_EVENT: Final = "@IIi" if EVENT_WORDS == 3 else "@IIIi"
_epoll_ctl: Any = getattr(ctypes.CDLL(None, use_errno=True), "epoll_ctl", None)
_ADD, _DELETE, _MODIFY = 1, 2, 3


@runtime_checkable
class LaneKernels(Protocol):
    """The kernels of lanes; `NumbaKernels` has them."""

    def lane(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Callable[..., None]:
        """Make the loop around the kernels of a step."""
        ...

    def exchange(self) -> Callable[[int, int, int], bool]:
        """Return `exchange` of `numba_words`, compiled."""
        ...


class Seat:
    """The place of one lane in a loop. One thread grants and waits; any thread ends a grant.

    Attributes:
        row: the words of the lane, `(WIDTH,) int64`, written between two grants alone.
    """

    def __init__(self, loop: LaneLoop, index: int, row: HostArray, end: socket.socket) -> None:
        """Take a place for a socket, which is open until `leave`.

        Raises:
            OSError: the system has no descriptors left.
        """
        self.row = row
        self._loop, self._index = loop, index
        self._address = int(row.ctypes.data)
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        row[:] = 0
        row[FD], row[BELL], row[ONE], row[SELF] = end.fileno(), self._bell, 1, self._address
        loop.write_event(row[EVENT : EVENT + 2], index)
        try:
            loop.register(_ADD, end.fileno(), index, 0)
        except OSError:
            os.close(self._bell)
            raise

    def grant(self) -> None:
        """Open the lane: the loop may step from now on, until the grant has ended.

        Raises:
            OSError: the system refuses it; the grant has ended.
        """
        assert self._loop.exchange(self._address, OVER, OPEN)
        try:
            self._loop.register(_MODIFY, int(self.row[FD]), self._index, select.EPOLLIN | select.EPOLLONESHOT)
        except OSError:
            self.end()
            self.wait()
            raise

    def end(self) -> None:
        """End the grant, after the step under way. Ending twice is harmless."""
        while not self._loop.exchange(self._address, OPEN, OVER):
            if self.row[WORD] == OVER:
                return
        os.eventfd_write(self._bell, 1)

    def wait(self) -> None:
        """Wait for the end of the grant, in the kernel."""
        while True:
            with contextlib.suppress(InterruptedError):  # a signal came to this thread
                os.eventfd_read(self._bell)
                return

    @property
    def seen(self) -> float:
        """The last time, of the monotonic clock, that the loop has looked at during a step; 0 before the first."""
        return float(self.row[TIME]) + 1e-9 * float(self.row[TIME + 1])

    def leave(self) -> None:
        """Give the place back; the grant has ended."""
        with contextlib.suppress(OSError, ValueError):  # the loop is closed
            self._loop.register(_DELETE, int(self.row[FD]), self._index, 0)
        os.close(self._bell)
        self._loop.free(self._index)


class LaneLoop:
    """One loop and its thread. Thread-safe.

    Attributes:
        exchange: puts a word in the place of an expected one; see `numba_words`.
    """

    def __init__(
        self, run: Callable[..., None], exchange: Callable[[int, int, int], bool], spin_microseconds: int = 0
    ) -> None:
        """Start to serve; with a moment of spinning after each datagram, see `LaneLoops`.

        Raises:
            OSError: the system has no descriptors left.
        """
        self.exchange = exchange
        self._run = run
        self._spin_seconds = spin_microseconds * 1e-6
        # The last row is the loop's own. Pages exist from their first use on.
        self._rows: HostArray = np.zeros((_MOST_LANES + 1, WIDTH), np.int64)
        self._events: HostArray = np.zeros(EVENT_WORDS * _MOST_LANES, np.uint32)
        self._free = list(range(_MOST_LANES - 1, -1, -1))
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self.register(_ADD, self._stop, _MOST_LANES, select.EPOLLIN)
        self._thread = threading.Thread(target=self._serve, name="compiled-lanes", daemon=True)
        self._thread.start()

    def seat(self, end: socket.socket) -> Seat | None:
        """Give a socket a place; None where there is none left."""
        with self._lock:
            if not self._free:
                return None
            index = self._free.pop()
        try:
            return Seat(self, index, self._rows[index], end)
        except BaseException:
            self.free(index)
            raise

    def free(self, index: int) -> None:
        """Have a place back."""
        with self._lock:
            self._free.append(index)

    def register(self, operation: int, descriptor: int, index: int, events: int) -> None:
        """Change the registration of a descriptor; see epoll_ctl.

        Raises:
            OSError: the system refuses it.
        """
        event = struct.pack(_EVENT, events, *[0] * (EVENT_WORDS == 4), index, 0)
        if _epoll_ctl(self._epoll.fileno(), operation, descriptor, event) < 0:
            problem = ctypes.get_errno()
            raise OSError(problem, os.strerror(problem))

    @staticmethod
    def write_event(words: HostArray, index: int) -> None:
        """Write the event that the loop registers a lane with, `(2,) int64`."""
        values = [select.EPOLLIN | select.EPOLLONESHOT, *[0] * (EVENT_WORDS == 4), index]
        words.view(np.uint32)[: len(values)] = values

    def close(self) -> None:
        """End the thread; all grants have ended."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._epoll.close()
        os.close(self._stop)

    def _serve(self) -> None:
        rows, events = int(self._rows.ctypes.data), int(self._events.ctypes.data)
        self._run(rows, self._epoll.fileno(), events, _MOST_LANES, self._spin_seconds)


class LaneLoops:
    """The loops of one engine, by the kernels of their steps. Thread-safe."""

    def __init__(self, kernels: LaneKernels, spin_microseconds: int = 0) -> None:
        """Make loops around these kernels.

        Args:
            kernels: the kernels.
            spin_microseconds: how long a loop waits awake for the next datagram before it sleeps. It rests where that
                is in vain, and never waits awake on one core.
        """
        self._kernels = kernels
        self._spin_microseconds = spin_microseconds if processor_count() > 1 else 0
        self._loops: dict[tuple[Any, ...], LaneLoop | None] = {}
        self._makers: list[threading.Thread] = []
        self._closed = False
        self._lock = threading.Lock()

    def loop(
        self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None, *, make: bool = True
    ) -> LaneLoop | None:
        """Return the loop of a kind of steps, made if need be; None as long as it is, and where there is none."""
        key = (*recipe.key, gradient, reply)
        with self._lock:
            if key in self._loops or not make or self._closed or len(self._loops) >= _MOST_LOOPS:
                return self._loops.get(key)
            maker = threading.Thread(
                target=self._make, args=(key, recipe, gradient, reply), name="compile-lane", daemon=True
            )
            try:
                maker.start()
            except RuntimeError as problem:  # no threads left: a later step asks again
                _log.warning("no compiled lane for %s just now: %s", recipe.name, problem)
                return None
            self._loops[key] = None
            self._makers.append(maker)
        return None

    def settle(self) -> None:
        """Wait for the loops that are being made."""
        for maker in self._makers:
            maker.join()

    def close(self) -> None:
        """End all loops; all grants have ended. Closing twice is harmless.

        A loop that is being compiled is waited for: the compiler is no thread to end a process under.
        """
        with self._lock:
            self._closed = True
        self.settle()
        with self._lock:
            loops, self._loops = [loop for loop in self._loops.values() if loop is not None], {}
        for loop in loops:
            loop.close()

    def _make(self, key: tuple[Any, ...], recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> None:
        try:
            run, exchange = self._kernels.lane(recipe, gradient, reply), self._kernels.exchange()
            with self._lock:
                if not self._closed:
                    self._loops[key] = LaneLoop(run, exchange, self._spin_microseconds)
        except Exception as problem:  # steps go their ordinary way
            _log.warning("no compiled lane for %s: %r", recipe.name, problem)
