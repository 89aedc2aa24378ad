"""The lock of a session, which a compiled lane may have instead: whoever locks ends the grant of the lane first.

A lane steps the session without the interpreter, from its grant to its end. What it did until then lies in its own
memory. So whoever locks the session first ends the grant, waits for the step under way, and settles what was done: the
numbers of the session, and the sinks of its commits. All that is done under the lock finds a session that Python alone
has stepped.

The step under way needs neither this lock nor the interpreter's. So the wait is as long as that step, and ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

__all__ = ["Grant", "SessionLock"]


class Grant(Protocol):
    """The right of a compiled lane to step a session."""

    def end(self) -> None:
        """End the grant, after the step under way. Ending twice is harmless."""
        ...

    def settle(self) -> None:
        """Tell the session of the steps of the grant, which has ended. Under the session's lock."""
        ...


class SessionLock:
    """A lock, and the grant that ends when it is acquired. A context manager."""

    __slots__ = ("_grant", "_lock", "_settling")

    def __init__(self) -> None:
        """Start free, without a grant."""
        self._lock = threading.Lock()
        self._settling = threading.Lock()
        self._grant: Grant | None = None

    def give(self, grant: Grant, begin: Callable[[], bool]) -> bool:
        """Leave the session to a lane. Whoever holds the lock calls this, and does nothing more before the release.

        The lane may step as soon as it begins. So a reader finds the grant before, and waits until it has begun.

        Args:
            grant: the grant.
            begin: begins it; returns False where it does not.

        Returns:
            True if it has begun.
        """
        with self._settling:
            begun = False
            self._grant = grant
            try:
                begun = begin()
            finally:
                if not begun:
                    self._grant = None
            return begun

    def settle(self) -> None:
        """End the grant, if there is one, and settle what was done.

        It does not wait for the lock. As long as there is a grant nobody is at work under the lock: whoever acquires it
        settles first. So a reader may settle under a lock of its own, which somebody at work under this one waits for.
        """
        if self._grant is None:
            return
        with self._settling:
            if (grant := self._grant) is None:
                return
            try:
                grant.end()
                grant.settle()
            finally:
                self._grant = None

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Acquire the lock, as that of `threading`; settle what a lane has done."""
        if not self._lock.acquire(blocking, timeout):
            return False
        if self._grant is not None:
            self._settle_locked()
        return True

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def __enter__(self) -> None:
        """Acquire the lock."""
        self._lock.acquire()
        if self._grant is not None:
            self._settle_locked()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock."""
        self._lock.release()

    def _settle_locked(self) -> None:
        try:
            self.settle()
        except BaseException:
            self._lock.release()
            raise
