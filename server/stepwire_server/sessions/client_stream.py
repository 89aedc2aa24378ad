"""One attached stream, as the session and the sweep see it."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Attachment"]


class Attachment:
    """One attached stream.

    Attributes:
        token: what its client was given.
        in_step: a step has begun and is not committed.
        orphaned: the slot or the session has moved on.
        ending: it has had its last answer and ends by itself; cancelling it would take from its client whatever of
            the answer is not yet read.
        last_seen: clock reading of its last frame.
    """

    def __init__(self, cancel: Callable[[], object], now: float) -> None:
        """Note a stream that `cancel` ends."""
        self.cancel = cancel
        self.token = 0
        self.in_step = False
        self.orphaned = False
        self.ending = False
        self.last_seen = now

    def overdue(self, now: float, idle_seconds: float) -> bool:
        """Tell whether the stream has been silent for too long where it must not be."""
        return (self.in_step or self.orphaned) and now - self.last_seen > idle_seconds
