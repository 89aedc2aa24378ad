"""One call for every shard, all at once."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from stepwire.connection.errands import adopt_thread
from stepwire.errors import DeadlineExceededError
from stepwire.sharding.coordinator import Abandoned

__all__ = ["FanOut"]

_T = TypeVar("_T")


class FanOut:
    """A thread a shard, started with the first call.

    gRPC and NumPy release the interpreter in the long parts of a call. Closes twice without complaint.
    """

    def __init__(self, size: int) -> None:
        """Be ready for `size` shards."""
        self._size = size
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def each(self, calls: Sequence[Callable[[], _T]], abandon: Callable[[], object] = lambda: None) -> list[_T]:
        """Make all calls in parallel, and wait for all of them.

        Args:
            calls: one call a shard.
            abandon: a function that is called as soon as one call fails, so that the others need not wait for it.

        Returns:
            The results of the calls, in order.

        Raises:
            BaseException: the failure of the first call in order that failed. A cause goes before its consequences: a
                shard that gave up because of another, or a deadline.
        """
        if len(calls) == 1:
            return [calls[0]()]
        running = [self._submit(call, abandon) for call in calls]
        try:
            failures = [failure for each in running if (failure := each.exception()) is not None]
        except BaseException:  # an interrupt of the user: no shard waits for another any longer
            abandon()
            raise
        if failures:
            raise min(failures, key=_remoteness)
        return [each.result() for each in running]

    def close(self) -> None:
        """End the threads when they are done. Closing twice is harmless."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False)
                self._pool = None

    def _submit(self, call: Callable[[], _T], abandon: Callable[[], object]) -> Future[_T]:
        context = contextvars.copy_context()  # a deadline of a shard ends with the errand of all

        def guarded() -> _T:
            try:
                return context.run(call)
            except BaseException:
                abandon()
                raise

        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._size, "stepwire-shard", adopt_thread)
            return self._pool.submit(guarded)


def _remoteness(failure: BaseException) -> int:
    """Rank failures: 0 for a cause."""
    if isinstance(failure, Abandoned):
        return 3 if failure.cause is None else 2
    return int(isinstance(failure, DeadlineExceededError))
