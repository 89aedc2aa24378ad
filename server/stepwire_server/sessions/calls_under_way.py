"""The calls that use a session just now: its lease does not run while one is under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["CallsUnderWay"]


class CallsUnderWay:
    """A count of calls. Thread-safe."""

    def __init__(self, used: Callable[[], object]) -> None:
        """Start at 0; `used` notes a use of the session, at the beginning and at the end of each call."""
        self._used = used
        self._count = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of calls under way."""
        return self._count

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Count a call for a block."""
        self._used()
        with self._lock:
            self._count += 1
        try:
            yield
        finally:
            self._used()
            with self._lock:
                self._count -= 1
