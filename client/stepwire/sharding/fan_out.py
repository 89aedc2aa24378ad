"""One call for every shard, all at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from stepwire.errors import DeadlineExceededError
from stepwire.sharding.coordinator import Abandoned

__all__ = ["FanOut"]

_T = TypeVar("_T")


class FanOut:
    """A thread a shard, started when first needed. gRPC and NumPy let go of the interpreter where time is spent."""

    def __init__(self, size: int) -> None:
        """Be ready for `size` shards."""
        self._size = size
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def each(self, calls: Sequence[Callable[[], _T]], abandon: Callable[[], object] = lambda: None) -> list[_T]:
        """Make all calls in parallel, and wait for all of them.

        Args:
            calls: one a shard.
            abandon: called as soon as one fails, so that the others need not wait for it.

        Returns:
            What they returned, in order.

        Raises:
            BaseException: what the first of them in order raised, and rather the cause than its consequences: that a
                shard gave up because of another, or that its time ran out.
        """
        if len(calls) == 1:
            return [calls[0]()]
        running = [self._submit(call, abandon) for call in calls]
        try:
            failures = [failure for each in running if (failure := each.exception()) is not None]
        except BaseException:  # the user's patience: whoever waits for others is let go
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
        def told() -> _T:
            try:
                return call()
            except BaseException:
                abandon()
                raise

        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._size, thread_name_prefix="stepwire-shard")
            return self._pool.submit(told)


def _remoteness(failure: BaseException) -> int:
    """Rank failures: 0 for a cause."""
    if isinstance(failure, Abandoned):
        return 3 if failure.cause is None else 2
    return int(isinstance(failure, DeadlineExceededError))
