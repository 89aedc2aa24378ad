"""The ends of things that nobody closes: after their owner was collected, or at the end of the process.

The garbage collector may run a finaliser in any thread at any moment, also under a lock of ours. So a finaliser only
puts the end into a queue, and a thread of its own makes the ends, one after another.

A process that ends normally makes the ends that are left, within some seconds. One that is killed makes none: a server
ends a session by its lease.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Final, TypeAlias

__all__ = ["ENDINGS", "End", "Ending", "Endings"]

_log = logging.getLogger("stepwire")

End: TypeAlias = Callable[[float], object]
"""A function that ends something within a number of seconds. It refers to no owner, or the owner is never collected."""

_SECONDS: Final = 5.0


class Ending:
    """One end. It is made once: with its owner, with the process, or by `make`; never after `cancel`."""

    def __init__(self, still_open: dict[Ending, None], end: End) -> None:
        """Be open until the end is made."""
        self._still_open = still_open
        self._end: End | None = end
        self._watch: weakref.ref[object] | None = None
        still_open[self] = None

    def follow(self, owner: object, put: Callable[..., object]) -> None:
        """Have `put` called with this end when an owner is collected.

        Nothing of that is Python. An interrupt that arrives in a finaliser in Python is swallowed, with the rest of the
        finaliser.
        """
        self._watch = weakref.ref(owner, functools.partial(put, self))  # `put` gets the reference as `block`, too

    def make(self, seconds: float = _SECONDS) -> None:
        """Make the end, unless it was made or cancelled; a failure is logged."""
        if (end := self._claimed()) is not None:
            try:
                end(seconds)
            except Exception as problem:
                _log.debug("an end was not made: %s", problem)

    def cancel(self) -> None:
        """Make no end."""
        self._claimed()

    def _claimed(self) -> End | None:
        """Return the end to the first caller alone: removing a key is one operation of the interpreter."""
        if self not in self._still_open:
            return None
        try:
            del self._still_open[self]
        except KeyError:
            return None
        end, self._end, self._watch = self._end, None, None
        return end


class Endings:
    """The open ends of a process. Thread-safe.

    Attributes:
        is_over: True once the process is ending.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without ends; the thread starts with the first."""
        self._clock = clock
        self._open: dict[Ending, None] = {}
        self.forget()

    def forget(self) -> None:
        """Begin anew without ends, in a forked child: those of its parent are the parent's."""
        self.is_over = False
        self._open.clear()
        self._due: queue.SimpleQueue[Ending | float] = queue.SimpleQueue()  # its `put` may interrupt any other method
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def with_owner(self, owner: object, end: End) -> Ending:
        """Make an end when an owner is collected, or when the process ends before.

        Args:
            owner: the owner.
            end: the end.

        Returns:
            The end, to make it earlier or never.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, args=(self._due,), name="stepwire-ends", daemon=True)
                self._thread.start()
                _at_the_end_of_a_worker(self.finish)
        ending = Ending(self._open, end)
        ending.follow(owner, self._due.put)
        return ending

    def finish(self, seconds: float = _SECONDS) -> None:
        """Make all ends that are open, the youngest first, and wait for them that long; the process is ending."""
        self.is_over = True
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._due.put(self._clock() + seconds)
            with contextlib.suppress(KeyboardInterrupt):  # a user who does not wait: leases end what is left
                thread.join(seconds)

    def _work(self, due: queue.SimpleQueue[Ending | float]) -> None:
        while isinstance(next_one := due.get(), Ending):
            next_one.make()
            del next_one  # and with it whatever was ended
        for ending in reversed(list(self._open)):
            ending.make(max(next_one - self._clock(), 0.0))


def _at_the_end_of_a_worker(call: Callable[[], object]) -> None:
    """Make a call when a child of `multiprocessing` ends: forked ones make no `atexit` function."""
    loaded = sys.modules.get("multiprocessing.util")
    if loaded is not None and sys.modules["multiprocessing.process"].parent_process() is not None:
        loaded.Finalize(None, call, exitpriority=0)


ENDINGS: Final = Endings()
"""The open ends of this process."""

# Registered with the first import of the package. So the functions that a program registers later run before it, and
# may train as ever.
atexit.register(ENDINGS.finish)
os.register_at_fork(after_in_child=ENDINGS.forget)
