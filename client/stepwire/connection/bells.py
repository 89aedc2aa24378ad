"""Waits for a change that another thread makes, safe from exceptions that arrive in either thread.

`threading.Condition` takes its lock in Python code. An exception that arrives between the lock and the `with` block
leaves the lock held for ever. Here each waiter has a queue of its own, and a queue is C in one piece.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

__all__ = ["Bells"]


class Bells:
    """One bell for each thread that waits. The state that they wait for is the owner's."""

    def __init__(self) -> None:
        """Start with no waiter."""
        self._waiting: list[queue.SimpleQueue[None]] = []

    def ring(self) -> None:
        """Have all waiters look again."""
        for bell in list(self._waiting):
            bell.put(None)

    def wait_for(self, holds: Callable[[], bool], timeout_seconds: float | None = None) -> bool:
        """Wait until a condition holds, and tell whether it does.

        Args:
            holds: the condition; it holds no lock that the ringing thread needs.
            timeout_seconds: the longest wait; None for any.
        """
        until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._waiting.append(bell)  # before the first look: a change after it rings
        try:
            while not holds():
                try:
                    bell.get(timeout=None if until is None else max(until - time.monotonic(), 0.0))
                except queue.Empty:
                    return holds()
            return True
        finally:
            self._waiting.remove(bell)
