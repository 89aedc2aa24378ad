"""Deadlines and retries: full jitter inside one deadline, with clock, sleep and randomness as arguments.

gRPC's own retry is off: it silently stops above 256 KiB a call, and knows of no step that is safe to repeat by its
number. This retry repeats whole calls, which every call of the contract permits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from stepwire.errors import ERROR_TABLE, DeadlineExceededError, StepwireError

__all__ = ["Deadline", "Retry"]

_T = TypeVar("_T")


class Deadline:
    """A moment that a call must not outlast."""

    def __init__(self, timeout_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the time."""
        self.timeout_seconds = timeout_seconds
        self._clock = clock
        self._end = clock() + timeout_seconds

    def remaining(self) -> float:
        """Return the seconds left, never below 0."""
        return max(self._end - self._clock(), 0.0)


class Retry:
    """Repeats a call while its errors permit it and its deadline has not passed."""

    def __init__(
        self,
        *,
        initial_seconds: float = 0.05,
        max_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Wait a random part of `initial_seconds`, doubling up to `max_seconds`."""
        self._initial_seconds = initial_seconds
        self._max_seconds = max_seconds
        self._clock = clock
        self._sleep = sleep
        self._uniform = uniform

    def deadline(self, timeout_seconds: float) -> Deadline:
        """Start a deadline on this retry's clock."""
        return Deadline(timeout_seconds, self._clock)

    def call(self, attempt: Callable[[Deadline], _T], deadline: Deadline) -> _T:
        """Call `attempt` until it returns, its error is final, or the deadline would pass.

        Raises:
            StepwireError: the final error; the last one when time runs out.
        """
        ceiling = self._initial_seconds
        while True:
            try:
                return attempt(deadline)
            except StepwireError as error:
                wait = max(self._uniform(0.0, ceiling), error.retry_after_seconds or 0.0)
                if not _retryable(error) or wait >= deadline.remaining():
                    raise
                self._sleep(wait)
            ceiling = min(ceiling * 2, self._max_seconds)


def _retryable(error: StepwireError) -> bool:
    if isinstance(error, DeadlineExceededError):
        return False
    return error.retry_after_seconds is not None or ERROR_TABLE[error.reason].retryable
