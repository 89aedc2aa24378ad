"""The gate every step passes: open while the server serves, closed while it drains."""

from __future__ import annotations

import threading
from types import TracebackType

from stepwire.errors import Reason, UnavailableError

__all__ = ["Drain"]


class Drain:
    """Counts the steps under way and refuses new ones once closed. Thread-safe.

    A step passes in a `with` block.
    """

    def __init__(self, retry_after_seconds: float = 1.0) -> None:
        """Start open; refused callers are told to come back after `retry_after_seconds`."""
        self._retry_after_seconds = retry_after_seconds
        self._lock = threading.Lock()
        self._emptied = threading.Condition(self._lock)
        self._awaited = False
        self._inside = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """New steps are refused."""
        return self._closed

    def __enter__(self) -> None:
        """Count one step in.

        Raises:
            UnavailableError: the gate is closed (SHUTTING_DOWN).
        """
        with self._lock:
            if self._closed:
                raise self.refusal()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Count one step out."""
        with self._lock:
            self._inside -= 1
            if self._awaited:
                self._emptied.notify_all()

    def refusal(self) -> UnavailableError:
        """Return what a caller is told once the gate is closed."""
        return UnavailableError(
            "the server is shutting down and takes no new steps; retry, or use another server",
            reason=Reason.SHUTTING_DOWN,
            retry_after_seconds=self._retry_after_seconds,
        )

    def close(self) -> None:
        """Refuse new steps from now on."""
        with self._lock:
            self._closed = True

    def wait_empty(self, timeout_seconds: float) -> bool:
        """Wait until no step is under way; False if some still are when the time is over."""
        with self._lock:
            self._awaited = True
            return self._emptied.wait_for(lambda: self._inside == 0, timeout_seconds)
