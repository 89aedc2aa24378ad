"""One call for every shard, all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from stepwire.connection.errands import together
from stepwire.errors import DeadlineExceededError, SessionMovedError
from stepwire.sharding.coordinator import Abandoned

__all__ = ["fan_out"]

_T = TypeVar("_T")


def fan_out(calls: Sequence[Callable[[], _T]], abandon: Callable[[], object] = lambda: None) -> list[_T]:
    """Make all calls in parallel, and wait for all of them.

    gRPC and NumPy release the interpreter in the long parts of a call.

    Args:
        calls: one call a shard.
        abandon: a function that is called as soon as one call fails, so that the others need not wait for it.

    Returns:
        The results of the calls, in order.

    Raises:
        BaseException: the failure of the first call in order that failed. A cause goes before its consequences: a
            shard that gave up because of another, or a deadline.
    """
    results: dict[int, _T] = {}
    failures: dict[int, BaseException] = {}

    def make(rank: int) -> None:
        try:
            results[rank] = calls[rank]()
        except BaseException as failure:
            failures[rank] = failure
            abandon()

    together(make, len(calls))
    try:
        if failures:
            raise min((failures[rank] for rank in sorted(failures)), key=_remoteness)
        return [results[rank] for rank in range(len(calls))]
    finally:
        failures.clear()  # whose tracebacks have this frame


def _remoteness(failure: BaseException) -> int:
    """Rank failures: 0 for a cause, and less for a move, which has ended the calls of the other shards."""
    if isinstance(failure, SessionMovedError):
        return -1
    if isinstance(failure, Abandoned):
        return 3 if failure.cause is None else 2
    return int(isinstance(failure, DeadlineExceededError))
