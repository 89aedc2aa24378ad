"""The attached streams of a server: counted, and cancelled where they are silent for too long."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Final

from stepwire.errors import StepwireError
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.refusals import too_many_streams, too_many_watchers
from stepwire_server.sessions.registry_limits import RegistryLimits

__all__ = ["RETURNING_STREAMS", "Streams"]

RETURNING_STREAMS: Final = 8
"""Streams beyond the most, of clients whose connection is half open: the one that they come to replace still counts."""

_MOST_WATCHERS: Final = 16
"""Each has a thread, of those that calls have besides streams."""


class Streams:
    """All streams. Thread-safe."""

    def __init__(self, limits: RegistryLimits, clock: Callable[[], float]) -> None:
        """Have no stream yet."""
        self._limits = limits
        self._clock = clock
        self._streams: set[ClientStream] = set()
        self._patience_seconds = math.inf
        self._watchers: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Count the streams."""
        return len(self._streams)

    def __iter__(self) -> Iterator[ClientStream]:
        """Iterate over the streams of this moment."""
        with self._lock:
            return iter(list(self._streams))

    @property
    def watchers(self) -> int:
        """The number of callers that watch the server."""
        return len(self._watchers)

    @contextlib.contextmanager
    def stream(self, cancel: Callable[[], object]) -> Iterator[ClientStream]:
        """See `Registry.stream`."""
        stream = ClientStream(cancel, self._clock())
        with self._lock:
            stream.surplus = len(self._streams) >= self._limits.streams
            full = len(self._streams) >= self._limits.streams + RETURNING_STREAMS
            displaced = self._displaced(lambda each: not each.is_open) if full else None
            if full and displaced is None:
                raise too_many_streams(self._limits.streams)
            self._streams.add(stream)
        if displaced is not None:
            displaced.cancel()
        try:
            yield stream
        finally:
            with self._lock:
                self._streams.discard(stream)

    def admit(self, stream: ClientStream, tenant: str, *, returns: bool) -> None:
        """Refuse a stream beyond a limit, unless another one makes room for it.

        Beyond the server's limit that is the longest silent one: of those that have not opened, or are idle for long.

        Args:
            stream: the stream.
            tenant: the tenant of the session that it attaches to.
            returns: it displaces the stream of its own worker.

        Raises:
            ResourceExhaustedError: the server, or the tenant, has all the streams it may have.
        """
        now, displaced = self._clock(), None
        with self._lock:
            if not returns:
                self._limits.tenant.check_stream(sum(each.tenant == tenant for each in self._streams))
                if stream.surplus:
                    displaced = self._displaced(lambda each: each is not stream and self._may_go(each, now))
                    if displaced is None:
                        raise too_many_streams(self._limits.streams)
                    stream.surplus = False
            stream.tenant = tenant
        if displaced is not None:
            displaced.cancel()

    def _may_go(self, stream: ClientStream, now: float) -> bool:
        return stream.may_be_displaced(now, self._limits.idle_seconds)

    def _displaced(self, may_be: Callable[[ClientStream], bool]) -> ClientStream | None:
        """Take out the stream that has been silent for longest of those that may be displaced."""
        found = min(filter(may_be, self._streams), key=lambda each: each.last_seen, default=None)
        if found is not None:
            self._streams.discard(found)
        return found

    @contextlib.contextmanager
    def watcher(self, cancel: Callable[[], object]) -> Iterator[None]:
        """Count a caller that watches the server for a block; `cancel` ends its call with the server.

        Raises:
            ResourceExhaustedError: as many watch as may.
        """
        with self._lock:
            if len(self._watchers) >= _MOST_WATCHERS:
                raise too_many_watchers(_MOST_WATCHERS)
            self._watchers.append(cancel)
        try:
            yield
        finally:
            with self._lock:
                self._watchers.remove(cancel)

    def hurry(self, patience_seconds: float) -> None:
        """From now on end those that have been silent for this long already: the server drains, and waits for them."""
        self._patience_seconds = patience_seconds

    def cancel_silent(self, now: float) -> None:
        """End those that have been silent for too long where they must not be."""
        idle_seconds = min(self._limits.idle_seconds, self._patience_seconds)
        with self._lock:
            silent = [stream for stream in self._streams if stream.overdue(now, idle_seconds)]
        for stream in silent:
            stream.cancel()

    def check(self) -> None:
        """End the streams whose identity may step no longer: each with its error."""
        for stream in self:
            try:
                stream.check()
            except StepwireError as error:
                stream.end(error)

    def cancel(self) -> None:
        """End every attached stream that does not end by itself, and the calls of those that watch."""
        with self._lock:
            cancels = [stream.cancel for stream in self._streams if not stream.ending] + self._watchers
        for cancel in cancels:
            cancel()
