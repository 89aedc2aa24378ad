"""The threads that make errands. One of them is always idle, and few are, whatever the number of callers."""

from __future__ import annotations

import _thread
import queue
import threading
from collections.abc import Callable
from typing import Final, TypeAlias

__all__ = ["MOST_IDLE", "OwnThreads", "Ring"]

Ring: TypeAlias = Callable[[], object]
"""Wakes the caller of an errand."""

MOST_IDLE: Final = 8
"""The most threads that wait for an errand."""


class OwnThreads:
    """The threads of one process that make errands. Thread-safe.

    Attributes:
        inbox: the errands to make; each returns the ring of its caller's bell, if that is to be rung.
    """

    def __init__(self) -> None:
        """Have none yet."""
        self.forget()

    def forget(self) -> None:
        """Begin anew, in a forked process that has none of the threads."""
        self.inbox: queue.SimpleQueue[Callable[[], Ring | None]] = queue.SimpleQueue()
        self._own = threading.local()
        self._lock = threading.Lock()
        self._idle = self._count = 0

    @property
    def is_one_of_them(self) -> bool:
        """This thread is the client's own."""
        return getattr(self._own, "is_adopted", False)

    def adopt(self) -> None:
        """Have this thread make its errands itself: no exception of other threads arrives in it."""
        self._own.is_adopted = True

    def start(self) -> None:
        """Have a thread, if there is none. Starting a `threading.Thread` takes locks, so another thread does it."""
        if self._count:
            return
        try:
            _thread.start_new_thread(self._begin, ())
        except RuntimeError:  # there are no more threads to be had
            while not self.inbox.empty():
                if (ring := self.inbox.get()()) is not None:
                    ring()

    def _begin(self) -> None:
        if not self._hire():
            self._work()

    def _hire(self) -> bool:
        with self._lock:
            self._count += 1
            self._idle += 1
        try:
            threading.Thread(target=self._work, name="stepwire-errands", daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._count -= 1
                self._idle -= 1
            return False
        return True

    def _work(self) -> None:
        self.adopt()
        while True:
            errand = self.inbox.get()
            with self._lock:
                self._idle -= 1
                is_last = self._idle <= 0
            if is_last:  # an errand may wait for the next one, which ends it
                self._hire()
            ring = errand()
            del errand  # its caller may wait for the end of what it holds
            with self._lock:  # before the ring: the caller wakes, and finds the interpreter free
                retires = self._idle >= MOST_IDLE
                self._count, self._idle = self._count - retires, self._idle + (not retires)
            if ring is not None:
                ring()
            if retires:
                return
            del ring
