"""Looking into a server in this process, so that a test waits for what happened instead of for time to pass."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from typing import Any

from stepwire_server.registry import Registry
from stepwire_server.session import Session
from stepwire_server.slot import Attachment

__all__ = ["Clock", "Happenings", "chunks_staged", "stream_ends"]

# Only bounds a test that would hang.
_PATIENCE_SECONDS = 30.0


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self._now = 1000.0

    def __call__(self) -> float:
        """Read the clock, in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


class Happenings:
    """What has happened so far, each to be waited for once."""

    def __init__(self) -> None:
        self._happened: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def note(self, what: Any = None) -> None:
        """It has happened once more."""
        self._happened.put(what)

    def wait(self, times: int = 1) -> None:
        """Wait until it has happened so many times more."""
        for _ in range(times):
            self._happened.get(timeout=_PATIENCE_SECONDS)


def stream_ends(registry: Registry) -> Happenings:
    """Tell of each attached stream that has ended, after the server has let go of all that it held."""
    ends, stream = Happenings(), registry.stream

    @contextlib.contextmanager
    def told(cancel: Callable[[], object]) -> Iterator[Attachment]:
        try:
            with stream(cancel) as attachment:
                yield attachment
        finally:
            ends.note()

    registry.stream = told  # type: ignore[method-assign]
    return ends


def chunks_staged(session: Session) -> Happenings:
    """Tell of each chunk of gradient that a step of the session has taken in; the next thing its stream does is wait."""
    staged, begin = Happenings(), session.begin

    def observed(*arguments: Any) -> Any:
        staging = begin(*arguments)
        if staging is not None:
            add = staging.add

            def added(*chunk: Any) -> None:
                add(*chunk)
                staged.note()

            staging.add = added  # type: ignore[method-assign]
        return staging

    session.begin = observed  # type: ignore[method-assign]
    return staged
