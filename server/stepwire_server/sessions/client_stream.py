"""One attached stream, as its session and the sweep see it."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["ClientStream"]


class ClientStream:
    """One attached stream, or one upload.

    Attributes:
        cancel: ends the stream.
        in_step: a step has begun and is not committed.
        orphaned: the worker or the session has moved on.
        ending: the last reply has left and the stream ends by itself. A cancel would take from its client the part of
            that reply that is not yet read.
        surplus: the server had all its streams when this one came: it may only displace another one.
        last_seen: the clock reading of its last frame.
    """

    def __init__(self, cancel: Callable[[], object], now: float) -> None:
        """Note a stream that `cancel` ends."""
        self.cancel = cancel
        self.in_step = False
        self.orphaned = False
        self.ending = False
        self.surplus = False
        self.last_seen = now

    def overdue(self, now: float, idle_seconds: float) -> bool:
        """Tell whether the stream has been silent for too long where it must not be."""
        return (self.in_step or self.orphaned) and now - self.last_seen > idle_seconds
