"""The last errors that clients were told, for a person who looks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from stepwire.errors import StepwireError

__all__ = ["Refusal", "Refusals"]

_MOST: Final = 50
_MOST_CHARACTERS: Final = 300


class Refusal(NamedTuple):
    """Errors of one reason and one text that followed one another.

    Attributes:
        reason: the reason.
        text: the beginning of the text.
        since: the time of the first, in seconds since 1970.
        at: the time of the last.
        times: their number.
    """

    reason: str
    text: str
    since: float
    at: float
    times: int


class Refusals:
    """The last refusals. Thread-safe, and never waits: of two that come at one time, one may count for both."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Start without one; `clock` returns seconds since 1970."""
        self._clock = clock
        self._last: deque[Refusal] = deque(maxlen=_MOST)

    def add(self, error: StepwireError) -> None:
        """Add an error that a client was told."""
        now, text = self._clock(), str(error)[:_MOST_CHARACTERS]
        last = self._last[-1] if self._last else None
        if last is not None and (last.reason, last.text) == (str(error.reason), text):
            self._last[-1] = last._replace(at=now, times=last.times + 1)
        else:
            self._last.append(Refusal(str(error.reason), text, now, now, 1))

    def last(self) -> list[Refusal]:
        """Return the refusals, from the oldest."""
        return list(self._last)
