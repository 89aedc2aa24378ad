"""Steps in the background: one after another, with a bound on the steps in flight."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from stepwire.errors import InvalidRequestError

__all__ = ["BackgroundStatistics", "BackgroundSteps"]


@dataclasses.dataclass(frozen=True, slots=True)
class BackgroundStatistics:
    """The background steps of one session, as of one moment.

    Attributes:
        limit: the most steps in flight.
        in_flight: the steps under way or waiting.
        failed: the steps that failed; those that were cancelled because of them are not counted.
    """

    limit: int
    in_flight: int
    failed: int


class BackgroundSteps:
    """A thread for the steps of one session, in the order in which they were handed in. Thread-safe.

    A step that fails cancels the steps behind it: their gradients belong to parameters that never were.
    """

    def __init__(self, limit: int) -> None:
        """Let `limit` steps be in flight: the step under way, and the waiting ones.

        Raises:
            InvalidRequestError: `limit` is not a positive integer.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InvalidRequestError.of("steps_in_flight", f"{limit!r} is not a positive integer")
        self._limit = limit
        self._vacancies = threading.BoundedSemaphore(limit)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stepwire-steps")
        self._waiting: list[Future[Any]] = []
        self._failed = 0
        self._lock = threading.Lock()

    def submit(self, step: Callable[[], Any]) -> Future[Any]:
        """Hand a step in; the call waits while as many steps as allowed are in flight."""
        self._vacancies.acquire()
        try:
            with self._lock:
                future = self._thread.submit(self._run, step)
                self._waiting.append(future)
        except BaseException:
            self._vacancies.release()
            raise
        future.add_done_callback(self._done)
        return future

    def statistics(self) -> BackgroundStatistics:
        """Return the numbers of steps in flight and of failures."""
        with self._lock:
            return BackgroundStatistics(limit=self._limit, in_flight=len(self._waiting), failed=self._failed)

    def close(self) -> None:
        """Cancel the waiting steps, and let the step under way end. Closing twice is harmless."""
        self._cancel_waiting()
        self._thread.shutdown(wait=False)

    def _run(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except BaseException:
            with self._lock:
                self._failed += 1
            self._cancel_waiting()
            raise

    def _cancel_waiting(self) -> None:
        with self._lock:
            waiting = list(self._waiting)
        for future in waiting:
            future.cancel()

    def _done(self, future: Future[Any]) -> None:
        with self._lock:
            self._waiting.remove(future)
        self._vacancies.release()
