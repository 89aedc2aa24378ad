"""Steps taken in the background, one after another, of which only so many wait at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from stepwire.errors import InvalidRequestError

__all__ = ["BackgroundSteps"]


class BackgroundSteps:
    """A thread that takes the steps of one session in the order in which they were handed in. Thread-safe.

    A step that fails takes those behind it with it: their gradients belong to parameters that never were.
    """

    def __init__(self, limit: int) -> None:
        """Let `limit` steps be in flight: the one under way and those that wait.

        Raises:
            InvalidRequestError: not a positive number.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InvalidRequestError(
                f"steps_in_flight: {limit!r} is not a positive integer", metadata={"field": "steps_in_flight"}
            )
        self._room = threading.BoundedSemaphore(limit)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stepwire-steps")
        self._waiting: list[Future[Any]] = []
        self._lock = threading.Lock()

    def submit(self, step: Callable[[], Any]) -> Future[Any]:
        """Hand a step in; waits while as many as allowed are in flight."""
        self._room.acquire()
        try:
            with self._lock:
                future = self._thread.submit(self._take, step)
                self._waiting.append(future)
        except BaseException:
            self._room.release()
            raise
        future.add_done_callback(self._done)
        return future

    def close(self) -> None:
        """Cancel what waits, and let the step under way end. Closing twice is harmless."""
        self._cancel_waiting()
        self._thread.shutdown(wait=False)

    def _take(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except BaseException:
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
        self._room.release()
