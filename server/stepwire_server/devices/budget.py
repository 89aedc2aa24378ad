"""The memory budget: bytes are reserved before they are allocated, and released exactly once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from stepwire.errors import Reason, ResourceExhaustedError

__all__ = ["BudgetStatistics", "MemoryBudget", "Reservation"]


class BudgetStatistics(NamedTuple):
    """The state of a budget at one moment.

    Attributes:
        limit_bytes: the bytes that can be reserved in all.
        reserved_bytes: the bytes reserved now.
        released_bytes: the bytes released since the start.
    """

    limit_bytes: int
    reserved_bytes: int
    released_bytes: int


class MemoryBudget:
    """Counts the bytes that sessions hold on one device. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        """Allow `limit_bytes` in all."""
        self.limit_bytes = limit_bytes
        self._reserved_bytes = 0
        self._released_bytes = 0
        self._lock = threading.RLock()  # the collector may end a reservation in the middle of another one
        self._make_room: Callable[[], bool] = lambda: False

    @property
    def released_bytes(self) -> int:
        """The bytes released since the start, which may lie free in the heap."""
        return self._released_bytes

    @property
    def reserved_bytes(self) -> int:
        """The bytes reserved now."""
        return self._reserved_bytes

    def statistics(self) -> BudgetStatistics:
        """Return the state of the budget now, all of one moment."""
        with self._lock:
            return BudgetStatistics(self.limit_bytes, self._reserved_bytes, self._released_bytes)

    def reserve(
        self, nbytes: int, purpose: str, *, retry_after_seconds: float | None = None, makes_room: bool = True
    ) -> Reservation:
        """Reserve bytes of the budget.

        Args:
            nbytes: the number of bytes.
            purpose: the subject of the error's sentence, such as "the session".
            retry_after_seconds: the time after which a client may try again; None where waiting does not help.
            makes_room: where bytes are short, others may be released for these; False for a caller with a lock that
                whoever releases them may wait for.

        Returns:
            The reservation, which the caller releases.

        Raises:
            ResourceExhaustedError: too few bytes are free; nothing was reserved.
        """
        while True:
            with self._lock:
                available = self.limit_bytes - self._reserved_bytes
                if nbytes <= available:
                    self._reserved_bytes += nbytes
                    return Reservation(self, nbytes)
            if nbytes > self.limit_bytes or not makes_room or not self._make_room():
                raise self._shortage(nbytes, purpose, available, retry_after_seconds)

    def on_shortage(self, make_room: Callable[[], bool]) -> None:
        """Have a function called where bytes are short, which releases some if it can, and tells whether it has."""
        self._make_room = make_room

    def require_possible(self, nbytes: int, purpose: str) -> None:
        """Refuse a number of bytes that would not fit even if nothing else were there.

        Args:
            nbytes: the number of bytes.
            purpose: the subject of the error's sentence.

        Raises:
            ResourceExhaustedError: the number is more than the whole budget.
        """
        if nbytes > self.limit_bytes:
            raise self._shortage(nbytes, purpose, self.limit_bytes, None)

    def _shortage(
        self, nbytes: int, purpose: str, available: int, retry_after_seconds: float | None
    ) -> ResourceExhaustedError:
        return ResourceExhaustedError(
            f"{purpose} needs {nbytes} bytes and {available} of {self.limit_bytes} are free; close sessions, or start "
            "the server with a larger --memory-budget",
            reason=Reason.MEMORY_EXHAUSTED,
            metadata={"requested_bytes": nbytes, "available_bytes": available},
            retry_after_seconds=retry_after_seconds,
        )

    def _give_back(self, nbytes: int) -> None:
        with self._lock:
            self._reserved_bytes -= nbytes
            self._released_bytes += nbytes


class Reservation:
    """Bytes of a budget that are reserved until `release`. A context manager."""

    def __init__(self, budget: MemoryBudget, nbytes: int) -> None:
        """Hold bytes that `MemoryBudget.reserve` has counted."""
        self._budget = budget
        self.nbytes = nbytes

    def release(self) -> None:
        """Give the bytes back to the budget. Releasing twice is harmless."""
        nbytes, self.nbytes = self.nbytes, 0
        self._budget._give_back(nbytes)

    def __enter__(self) -> Reservation:
        """Hold the bytes for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release."""
        self.release()
