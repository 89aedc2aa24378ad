"""Deadlines and retries: full jitter inside one deadline, with clock, sleep and randomness as arguments.

gRPC's own retry is off: it silently stops above 256 KiB a call, and knows of no step that is safe to repeat by its
number. This retry repeats whole calls, which every call of the contract permits.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from stepwire.connection.errands import ends_with
from stepwire.errors import ERROR_TABLE, DeadlineExceededError, StepwireError

__all__ = ["Deadline", "Retry"]

_T = TypeVar("_T")


class Deadline:
    """A moment that a call must not outlast, and that another thread can bring forward.

    Attributes:
        timeout_seconds: the time from the start to the moment.
        ended: True after `end`.
    """

    def __init__(self, timeout_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the time."""
        self.timeout_seconds = timeout_seconds
        self.ended = False
        self._clock = clock
        self._end = clock() + timeout_seconds
        self._lock = threading.Lock()
        self._cancels: list[Callable[[], object]] = []

    def remaining(self) -> float:
        """Return the seconds left, never below 0."""
        return 0.0 if self.ended else max(self._end - self._clock(), 0.0)

    def spend(self, seconds: float) -> None:
        """Let the time have started so many seconds earlier."""
        self._end -= seconds

    def end(self) -> None:
        """Let the time be over now, and cancel everything that goes on within it."""
        with self._lock:
            self.ended = True
            cancels = list(self._cancels)
        for cancel in cancels:
            cancel()

    @contextlib.contextmanager
    def within(self, cancel: Callable[[], object]) -> Iterator[None]:
        """Have `end` call `cancel` for as long as the block lasts; at once, if the time was ended before."""
        try:
            self.enter(cancel)
            yield
        finally:
            self.leave(cancel)

    def enter(self, cancel: Callable[[], object]) -> None:
        """Have `end` call `cancel` until `leave`; at once, if the time was ended before."""
        with self._lock:
            self._cancels.append(cancel)
        if self.ended:
            cancel()

    def leave(self, cancel: Callable[[], object]) -> None:
        """Have `end` not call `cancel` any more."""
        with self._lock:
            self._cancels.remove(cancel)

    @contextlib.contextmanager
    def part(self) -> Iterator[Deadline]:
        """Return a deadline of the same moment for a block, which may be ended without this one."""
        part = Deadline(self.timeout_seconds, self._clock)
        part._end = self._end
        with self.within(part.end):
            yield part

    def pause(self, seconds: float) -> None:
        """Sleep, until `end` at the longest."""
        over = threading.Event()
        with self.within(over.set):
            over.wait(seconds)


class Retry:
    """Repeats a call while its errors permit it and its deadline has not passed."""

    def __init__(
        self,
        *,
        initial_seconds: float = 0.05,
        max_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Wait a random part of `initial_seconds`, doubling up to `max_seconds`.

        Args:
            initial_seconds: the longest first pause.
            max_seconds: the longest pause.
            clock: the seconds of a clock.
            sleep: the pause; None for one that ends with the deadline.
            uniform: a random number between two others.
        """
        self._initial_seconds = initial_seconds
        self._max_seconds = max_seconds
        self._clock = clock
        self._sleep = sleep
        self._uniform = uniform

    def deadline(self, timeout_seconds: float) -> Deadline:
        """Start a deadline on this retry's clock; it ends at once if the caller of the present errand leaves."""
        deadline = Deadline(timeout_seconds, self._clock)
        ends_with(deadline.end)
        return deadline

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
                (self._sleep or deadline.pause)(wait)
                if deadline.ended:
                    raise
            ceiling = min(ceiling * 2, self._max_seconds)


def _retryable(error: StepwireError) -> bool:
    if isinstance(error, DeadlineExceededError):
        return False
    return error.retry_after_seconds is not None or ERROR_TABLE[error.reason].retryable
