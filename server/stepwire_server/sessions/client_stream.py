"""One attached stream, as its session and the sweep see it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from stepwire.errors import StepwireError

__all__ = ["ClientStream"]

_T = TypeVar("_T")


class ClientStream:
    """One attached stream.

    Attributes:
        cancel: a function that ends the stream.
        refuse: a function that ends the stream with an error, from any thread; by default `cancel`.
        check: a function that raises if whoever attached may step no longer.
        tenant: the tenant of its session; None before it is admitted.
        is_open: it has said which session it attaches to.
        in_step: a step has begun and is not committed.
        orphaned: the worker has moved on.
        ending: the last reply has left and the stream ends by itself. A cancel would take from its client the part of
            that reply that is not yet read.
        gone: the client has left, while a step of it may still wait for other workers.
        surplus: the server had all its streams when this one came: it may only displace another one.
        last_seen: the clock reading of its last frame.
        seen_in_lane: returns the clock reading of its last step in a compiled lane.
        transport: the way that its steps come; see `Committed`.
    """

    def __init__(self, cancel: Callable[[], object], now: float) -> None:
        """Note a stream that `cancel` ends."""
        self.cancel = cancel
        self.refuse: Callable[[StepwireError], object] = lambda error: cancel()
        self.check: Callable[[], object] = lambda: None
        self.tenant: str | None = None
        self.is_open = self.in_step = False
        self.orphaned = False
        self.ending = False
        self.surplus = self.gone = False
        self.last_seen = now
        self.seen_in_lane: Callable[[], float] = lambda: 0.0
        self.transport = "tcp"
        self._refusal: StepwireError | None = None
        self._waits = False
        self._lock = threading.Lock()

    def left(self) -> None:
        """Note that the client has left. From any thread, and at once: gRPC's own calls it."""
        self.gone = True

    def overdue(self, now: float, idle_seconds: float) -> bool:
        """Tell whether the stream has been silent for too long where it must not be."""
        return (self.in_step or self.orphaned) and now - self.last_seen > idle_seconds

    def may_be_displaced(self, now: float, idle_seconds: float) -> bool:
        """Tell whether a stream that the server has no place for may displace this one.

        That is one that has not opened, or has been silent between two steps for so long that its client will hardly
        miss it: it attaches again before its next step.
        """
        seen = max(self.last_seen, self.seen_in_lane())
        return not self.is_open or self._waits and not self.in_step and now - seen > idle_seconds

    def has_waited_since(self, before: float) -> bool:
        """Tell whether the stream has waited for a message since before a clock reading."""
        return self._waits and max(self.last_seen, self.seen_in_lane()) < before

    def received(self, messages: Iterator[_T]) -> Iterator[_T]:
        """Iterate over the messages of the client, until the stream is ended.

        Raises:
            StepwireError: the stream was ended, while it was not waiting for a message.
        """
        return _Received(messages, self._wait, self._go_on)

    def end(self, error: StepwireError) -> None:
        """End the stream with an error: at once if it waits for a message, else when it would wait for the next one."""
        with self._lock:
            self._refusal = self._refusal or error
            if not self._waits:
                return
        self.refuse(error)

    def _wait(self) -> None:
        with self._lock:
            if self._refusal is not None:
                raise self._refusal
            self._waits = True

    def _go_on(self) -> None:
        with self._lock:
            self._waits = False


class _Received(Iterator[_T], Generic[_T]):
    """An iterator that keeps no message: a message holds megabytes."""

    def __init__(self, messages: Iterator[_T], wait: Callable[[], object], go_on: Callable[[], object]) -> None:
        self._messages = messages
        self._wait = wait
        self._go_on = go_on

    def __next__(self) -> _T:
        self._wait()
        try:
            return next(self._messages)
        finally:
            self._go_on()
