"""The attached streams of a server: counted, and cancelled where they are silent for too long."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from stepwire.errors import StepwireError
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.refusals import too_many_streams, too_many_watchers
from stepwire_server.sessions.registry_limits import RegistryLimits

__all__ = ["RETURNING_STREAMS", "Streams"]

RETURNING_STREAMS: Final = 8
"""Streams beyond the most, of clients whose connection is half open: the one that they come to replace still counts."""

_SLOW_SECONDS: Final = 1.0
"""The time after which a stream that waits for a message counts as slow with it."""

_MOST_WATCHERS: Final = 16
"""Each has a thread, of those that calls have besides streams."""


class _Watcher(NamedTuple):
    """A caller that watches the server: a function that ends its call, and its tenant, None for one that sees all."""

    cancel: Callable[[], object]
    tenant: str | None


class Streams:
    """All streams. Thread-safe."""

    def __init__(self, limits: RegistryLimits, clock: Callable[[], float]) -> None:
        """Have no stream yet."""
        self._limits = limits
        self._clock = clock
        self._streams: set[ClientStream] = set()
        self._patience_seconds = math.inf
        self._watchers: list[_Watcher] = []
        self._lock = threading.RLock()  # the collector may end a stream in the middle of a look at all of them

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
        """Count a stream for a block; the sweep cancels it when it is silent where it must not be.

        A full server admits a few more, for clients that come back after their connection broke without the server's
        notice: see `admit`.

        Raises:
            ResourceExhaustedError: the server has all the streams it takes.
        """
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
                self._limits.tenant.check_stream(sum(each.tenant == tenant for each in list(self._streams)))
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
        found = min(filter(may_be, list(self._streams)), key=lambda each: each.last_seen, default=None)
        if found is not None:
            self._streams.discard(found)
        return found

    @contextlib.contextmanager
    def watcher(self, cancel: Callable[[], object], tenant: str | None = None) -> Iterator[None]:
        """Count a caller that watches the server for a block; `cancel` ends its call with the server.

        Where as many watch as may, the tenant with the most of them gives up the oldest for one that has fewer.

        Args:
            cancel: ends the call.
            tenant: the tenant of the caller; None for one that sees all.

        Raises:
            ResourceExhaustedError: as many watch as may, and no tenant has more than the caller's would have.
        """
        watcher, displaced = _Watcher(cancel, tenant), None
        with self._lock:
            if len(self._watchers) >= _MOST_WATCHERS:
                displaced = self._greedy(tenant)
                self._watchers.remove(displaced)
            self._watchers.append(watcher)
        if displaced is not None:
            displaced.cancel()
        try:
            yield
        finally:
            with self._lock:
                if watcher in self._watchers:
                    self._watchers.remove(watcher)

    def _greedy(self, tenant: str | None) -> _Watcher:
        """Return the watcher that makes room for one of a tenant.

        Raises:
            ResourceExhaustedError: there is none.
        """
        held = Counter(each.tenant for each in self._watchers)
        oldest = max(self._watchers, key=lambda each: held[each.tenant])
        if held[oldest.tenant] <= held[tenant] + 1:
            raise too_many_watchers(_MOST_WATCHERS)
        return oldest

    def hurry(self, patience_seconds: float) -> None:
        """From now on end those that have been silent for this long already: the server drains, and waits for them."""
        self._patience_seconds = patience_seconds

    def cancel_silent(self, now: float) -> None:
        """End those that have been silent for too long where they must not be."""
        idle_seconds = min(self._limits.idle_seconds, self._patience_seconds)
        with self._lock:
            silent = [stream for stream in list(self._streams) if stream.overdue(now, idle_seconds)]
        for stream in silent:
            stream.cancel()

    def end_waiting(self) -> int:
        """End those that wait for a message, and may hold a part of one; return their number.

        Those that have had a message in the last second go on. The clients of the others attach again.
        """
        before = self._clock() - _SLOW_SECONDS
        with self._lock:
            waiting = [stream for stream in list(self._streams) if stream.has_waited_since(before)]
        for stream in waiting:
            stream.cancel()
        return len(waiting)

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
            cancels = [stream.cancel for stream in list(self._streams) if not stream.ending]
            cancels += [watcher.cancel for watcher in self._watchers]
        for cancel in cancels:
            cancel()
