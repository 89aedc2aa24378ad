"""Calls one after another, each in a thread of the client's own, while nobody waits for them."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from stepwire.connection.errands import later

__all__ = ["Series"]


class Series:
    """Calls in the order in which they were added. There is a thread for them only while there are calls."""

    def __init__(self) -> None:
        """Start without calls."""
        self._waiting: collections.deque[Callable[[], object]] = collections.deque()
        self._has_thread = False
        self._lock = threading.Lock()

    def add(self, call: Callable[[], object]) -> None:
        """Make a call after all those before it. It raises nothing."""
        with self._lock:
            self._waiting.append(call)
            if self._has_thread:
                return
            self._has_thread = True
        later(self._make)

    def _make(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._has_thread = False
                    return
                call = self._waiting.popleft()
            call()
            del call
