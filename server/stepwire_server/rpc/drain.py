"""The end of a server: new steps are refused, and the steps under way are waited for."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import NamedTuple

from stepwire.errors import Reason, UnavailableError

__all__ = ["Admission", "Drain", "DrainStatistics"]


class DrainStatistics(NamedTuple):
    """The state of a drain.

    Attributes:
        started: True once new steps are refused.
        steps: the number of steps under way.
    """

    started: bool
    steps: int


class Drain:
    """Counts the steps under way, and refuses new steps once started. Thread-safe.

    A step runs in a block of `admit`. So do creations of sessions and loads: a drain waits for them too.
    """

    def __init__(self, retry_after_seconds: float = 1.0) -> None:
        """Admit steps until `start`.

        Args:
            retry_after_seconds: the pause that a refused caller is told.
        """
        self._retry_after_seconds = retry_after_seconds
        self._lock = threading.RLock()
        self._emptied = threading.Condition(self._lock)
        self._awaited = False
        self._steps = 0
        self._started = self._hastened = False
        self._admission = Admission(self)

    @property
    def started(self) -> bool:
        """True once new steps are refused."""
        return self._started

    def admit(self) -> Admission:
        """Return the block of one step; entering the block raises UnavailableError once the drain has started."""
        return self._admission

    def refusal(self) -> UnavailableError:
        """Return the error of a step that comes once the drain has started."""
        return UnavailableError(
            "the server is shutting down and takes no new steps; retry, or use another server",
            reason=Reason.SHUTTING_DOWN,
            retry_after_seconds=self._retry_after_seconds,
        )

    def start(self) -> None:
        """Refuse new steps from now on. Starting twice is harmless."""
        with self._emptied:
            self._started = True

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until no step is under way.

        Args:
            timeout_seconds: the longest wait.

        Returns:
            True if no step is under way, False if the time ran out, or was ended by `hasten`, before.
        """
        with self._emptied:
            self._awaited = True
            self._emptied.wait_for(lambda: self._steps == 0 or self._hastened, timeout_seconds)
            return self._steps == 0

    def hasten(self) -> None:
        """End the wait for steps under way, now or when it begins."""
        with self._emptied:
            self._hastened = True
            self._emptied.notify_all()

    def statistics(self) -> DrainStatistics:
        """Return the state as of now."""
        with self._emptied:
            return DrainStatistics(self._started, self._steps)

    def _enter(self) -> None:
        with self._lock:
            if self._started:
                raise self.refusal()
            self._steps += 1

    def _leave(self) -> None:
        with self._lock:
            self._steps -= 1
            if self._awaited:
                self._emptied.notify_all()


class Admission:
    """The block of a step: one for all steps of a drain, because it holds nothing of a step."""

    def __init__(self, drain: Drain) -> None:
        """Admit the steps of a drain."""
        self._drain = drain

    def __enter__(self) -> None:
        """Count one step in.

        Raises:
            UnavailableError: the drain has started (SHUTTING_DOWN).
        """
        self._drain._enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Count one step out."""
        self._drain._leave()
