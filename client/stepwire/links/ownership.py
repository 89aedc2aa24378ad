"""The end of a session that nobody closes: with its object, with its client, or with the process.

A program that drops a session has no more use for it, unless it was told to keep it, or somebody has the id. Then the
session stays on the server until its lease runs out, and only the stream ends.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

from stepwire.lifetimes.endings import ENDINGS
from stepwire.lifetimes.forks import Birthplace
from stepwire.links.link import SessionLink
from stepwire.results import SessionStatistics
from stepwire.steps.background import BackgroundSteps

__all__ = ["Ownership"]


@dataclasses.dataclass
class _Remains:
    """The things that a session leaves behind.

    Attributes:
        link: the link to the session.
        kept: True if the session stays on the server.
        background: its steps in the background; None before the first.
    """

    link: SessionLink
    kept: bool
    background: BackgroundSteps | None = None

    def end(self, seconds: float) -> None:
        """End the steps in the background, the stream, and the session unless it is kept."""
        if self.background is not None:
            self.background.close()
        if not self.link.lock.acquire(timeout=seconds):
            return  # a step is under way for longer than the process waits
        try:
            self.link.leave(None if self.kept else seconds)
        finally:
            # At the end of the process the lock stays acquired: a daemon thread that steps stops there without an
            # error.
            if not ENDINGS.is_over:
                self.link.lock.release()


class Ownership:
    """The ownership of one session by this process; it ends with the last object that refers to it. Thread-safe."""

    def __init__(self, link: SessionLink, *, kept: bool) -> None:
        """Own the session of a link; with `kept` it stays on the server when nobody closes it."""
        self._birthplace = Birthplace()
        self._remains = _Remains(link, kept)
        self._ending = ENDINGS.with_owner(self, self._remains.end)
        self._lock = threading.Lock()

    def keep(self) -> None:
        """Leave the session on the server when nobody closes it."""
        self._remains.kept = True

    def in_background(self, limit: int) -> BackgroundSteps:
        """Return the steps in the background, made by the first call with its limit of steps in flight.

        Raises:
            InvalidRequestError: the limit is not a positive integer.
        """
        with self._lock:
            self._remains.background = made = self._remains.background or BackgroundSteps(limit)
            return made

    def end(self) -> None:
        """End everything now, as without any object left. Ending twice is harmless."""
        self._ending.make()

    def detach(self, link: SessionLink, check: Callable[[], object]) -> None:
        """Close the stream of a link, and leave the session on the server; do nothing in a forked child.

        Args:
            link: the whole session, or a shard of it.
            check: refuses a call from within a step.
        """
        if self._birthplace.is_here:
            check()
            self.keep()
            with link.lock:
                link.detach()

    def close(self, link: SessionLink, check: Callable[[], object]) -> None:
        """End the session of a link on the server; do nothing in a forked child, whose parent has the session.

        Args:
            link: the whole session, or a shard of it.
            check: refuses a call from within a step.

        Raises:
            StepwireError: as `SessionLink.close`.
        """
        if not self._birthplace.is_here:
            return
        check()
        with self._lock:
            background, self._remains.background = self._remains.background, None
        if background is not None:
            background.close()
        with link.lock:
            link.close()
        if link is self._remains.link:
            self._ending.cancel()

    def statistics(self, link: SessionLink) -> SessionStatistics:
        """Return the numbers of a link, with those of the steps in the background."""
        statistics = link.statistics()
        if (background := self._remains.background) is None:
            return statistics
        counts = background.statistics()
        return dataclasses.replace(statistics, steps_in_flight=counts.in_flight, background_failures=counts.failed)
