"""Waiting without time: a clock that only tests move, and happenings that are waited for."""

from __future__ import annotations

import queue
from typing import Any, Final

__all__ = ["PATIENCE_SECONDS", "Clock", "Happenings"]

PATIENCE_SECONDS: Final = 120.0
"""Only bounds a test that would hang."""


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self._now = 1000.0

    def __call__(self) -> float:
        """Read the clock, in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


class Happenings:
    """What has happened so far, each to be waited for once."""

    def __init__(self) -> None:
        self._happened: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def note(self, what: Any = None) -> None:
        """It has happened once more."""
        self._happened.put(what)

    def wait(self, times: int = 1) -> None:
        """Wait until it has happened so many times more."""
        for _ in range(times):
            self._happened.get(timeout=PATIENCE_SECONDS)
