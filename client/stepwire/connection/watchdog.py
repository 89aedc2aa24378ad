"""A deadline for something that blocks without one: the next message of a long-lived stream.

A timer thread for each step would cost more than a small step. One sleeping thread a stream costs nothing. A step only
notes its deadline. The thread wakes at an earlier deadline, sees the newer one, and sleeps on. It ends where two looks
in a row find no deadline, and the next deadline starts another thread: a stream that rests, or that nobody can end any
more, holds none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Watchdog"]


class Watchdog:
    """Calls `bark` once when an armed deadline passes before it is disarmed."""

    def __init__(
        self, bark: Callable[[], object], clock: Callable[[], float] = time.monotonic, look_seconds: float = 1.0
    ) -> None:
        """Watch nothing yet; the thread starts with the first `arm`.

        Args:
            bark: called once, in the thread.
            clock: the seconds of a clock.
            look_seconds: the time between two looks for a deadline.
        """
        self.barked = False
        self._bark = bark
        self._clock = clock
        self._look_seconds = look_seconds
        self._lock = threading.RLock()  # the garbage collector may close within any other method
        self._condition = threading.Condition(self._lock)
        self._deadline: float | None = None
        self._wakes_at = float("inf")
        self._closed = False
        self._thread: threading.Thread | None = None

    def arm(self, seconds: float) -> None:
        """Bark in this many seconds unless disarmed or armed anew."""
        with self._lock:
            self._deadline = self._clock() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="stepwire-watchdog", daemon=True)
                self._thread.start()
            elif self._deadline < self._wakes_at:
                self._condition.notify()

    def disarm(self) -> None:
        """Forget the deadline."""
        self._deadline = None

    def close(self) -> None:
        """End the thread. Closing twice is harmless."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _watch(self) -> None:
        rests = False
        with self._condition:
            while not self._closed:
                deadline = self._deadline
                if deadline is not None and self._clock() >= deadline:
                    self.barked = self._closed = True
                    break
                if rests and deadline is None:
                    self._thread = None
                    break
                # Disarmed, it looks again after a while instead of being woken by each `arm`.
                rests = deadline is None
                self._wakes_at = self._clock() + self._look_seconds if deadline is None else deadline
                self._condition.wait(min(self._wakes_at - self._clock(), threading.TIMEOUT_MAX))
        if self.barked:
            self._bark()
