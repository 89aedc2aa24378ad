"""The calls that use a session just now: its lease does not run while one is under way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["CallsUnderWay", "LastUse"]


class LastUse:
    """The clock reading of the last use of a session.

    The calls of a session note it, and do not refer to the session: a cycle would keep the memory of a session that has
    ended until the collector runs.

    Attributes:
        at: the reading.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Start with a use now."""
        self._clock = clock
        self.at = clock()

    def note(self) -> None:
        """Note a use now."""
        self.at = self._clock()


class CallsUnderWay:
    """A count of calls. Thread-safe."""

    def __init__(self, last_use: LastUse) -> None:
        """Start at 0; the beginning and the end of each call is a use."""
        self._last_use = last_use
        self._count = 0
        self._lock = threading.RLock()  # the collector may end a call in the middle of another one

    def __len__(self) -> int:
        """Return the number of calls under way."""
        return self._count

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Count a call for a block."""
        self._last_use.note()
        with self._lock:
            self._count += 1
        try:
            yield
        finally:
            self._last_use.note()
            with self._lock:
                self._count -= 1
