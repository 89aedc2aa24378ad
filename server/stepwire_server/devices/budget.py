"""The memory budget: bytes are reserved before they are allocated, and given back exactly once."""

from __future__ import annotations

import threading
from types import TracebackType

from stepwire.errors import Reason, ResourceExhaustedError

__all__ = ["MemoryBudget", "Reservation"]


class MemoryBudget:
    """Counts the bytes that sessions hold on one device. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        """Allow `limit_bytes` in all."""
        self.limit_bytes = limit_bytes
        self._reserved_bytes = 0
        self._released_bytes = 0
        self._lock = threading.Lock()

    @property
    def released_bytes(self) -> int:
        """Bytes given back since the start: what may lie free in the heap."""
        return self._released_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved now."""
        return self._reserved_bytes

    def reserve(self, nbytes: int, purpose: str, *, retry_after_seconds: float | None = None) -> Reservation:
        """Take bytes out of the budget.

        Args:
            nbytes: how many.
            purpose: what for, as the error says it.
            retry_after_seconds: set where the shortage is likely to pass.

        Raises:
            ResourceExhaustedError: they are not there; nothing was reserved.
        """
        with self._lock:
            available = self.limit_bytes - self._reserved_bytes
            if nbytes > available:
                raise self._shortage(nbytes, purpose, available, retry_after_seconds)
            self._reserved_bytes += nbytes
        return Reservation(self, nbytes)

    def require_possible(self, nbytes: int, purpose: str) -> None:
        """Refuse what would not fit even if nothing else were there.

        Raises:
            ResourceExhaustedError: it is more than the whole budget.
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
    """Bytes taken out of a budget until `release`. A context manager."""

    def __init__(self, budget: MemoryBudget, nbytes: int) -> None:
        """Hold bytes that `MemoryBudget.reserve` took."""
        self._budget = budget
        self.nbytes = nbytes

    def release(self) -> None:
        """Give the bytes back. Releasing twice is harmless."""
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
