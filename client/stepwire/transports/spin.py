"""A moment of waiting awake, before a thread sleeps: it saves the wake of a sleeping core where a reply comes soon.

It costs a core for as long as it lasts. So it is off unless a user asks for it. It is bounded, and rests where replies
come later than it lasts. A process that may run on one core alone never waits awake: the server needs that core.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Final

from stepwire.errors import InvalidRequestError
from stepwire.wire.packets import MOST_SPIN_MICROSECONDS, SPIN_MISSES, SPIN_REST

__all__ = ["Spin", "spin_microseconds"]

_VARIABLE: Final = "STEPWIRE_LANE_SPIN_MICROSECONDS"


def spin_microseconds(environment: Mapping[str, str] = os.environ) -> int:
    """Return the moment that STEPWIRE_LANE_SPIN_MICROSECONDS asks for; 0 without it, and on one core.

    Raises:
        InvalidRequestError: it is no whole number from 0 to 50.
    """
    text = environment.get(_VARIABLE, "0")
    if not (text.isascii() and text.isdecimal() and int(text) <= MOST_SPIN_MICROSECONDS):
        raise InvalidRequestError.of(
            _VARIABLE, f"{text!r} is no whole number from 0 to {MOST_SPIN_MICROSECONDS}; use one, or unset the variable"
        )
    return int(text) if len(os.sched_getaffinity(0)) > 1 else 0


class Spin:
    """The moments of one lane. After some in vain it rests for a while, and tries again then."""

    def __init__(self, microseconds: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Wait awake for at most so long at a time."""
        self._seconds = microseconds * 1e-6
        self._clock = clock
        self._misses = 0
        self._rest = 0

    def wait(self, ready: Callable[[], object]) -> None:
        """Wait awake until something is ready, or the moment is over."""
        if self._rest:
            self._rest -= 1
            return
        end = self._clock() + self._seconds
        while self._clock() < end:
            if ready():
                self._misses = 0
                return
        self._misses += 1
        if self._misses == SPIN_MISSES:
            self._misses, self._rest = 0, SPIN_REST
