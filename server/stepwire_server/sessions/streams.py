"""The streams and uploads of a server: counted, and cancelled where they are silent for too long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Final

from stepwire.errors import StepwireError
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.refusals import too_many_streams, too_many_watchers

__all__ = ["Streams"]

# Of clients whose connection is half open: the server still counts the stream that they come to replace.
_RETURNING_STREAMS: Final = 8
_MOST_WATCHERS: Final = 16
"""Each has a thread, of those that calls have besides streams."""


class Streams:
    """All streams and uploads. Thread-safe."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        """Allow so many attached streams at a time."""
        self._most = most
        self._clock = clock
        self._streams: set[ClientStream] = set()
        self._uploads: set[ClientStream] = set()
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
            stream.surplus = len(self._streams) >= self._most
            if len(self._streams) >= self._most + _RETURNING_STREAMS:
                raise too_many_streams(self._most)
            self._streams.add(stream)
        try:
            yield stream
        finally:
            with self._lock:
                self._streams.discard(stream)

    @contextlib.contextmanager
    def upload(self, cancel: Callable[[], object]) -> Iterator[Callable[[], bool]]:
        """Watch a load for a block; yields what to call, always true, with each message it brings.

        The sweep cancels a load that is silent: it holds memory, and a draining server waits for it. Loads are not
        counted as streams, or a server with as many clients as it takes would refuse every load.
        """
        stream = ClientStream(cancel, self._clock())
        stream.in_step = True

        def seen() -> bool:
            stream.last_seen = self._clock()
            return True

        with self._lock:
            self._uploads.add(stream)
        try:
            yield seen
        finally:
            with self._lock:
                self._uploads.discard(stream)

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

    def cancel_silent(self, now: float, idle_seconds: float) -> None:
        """End those that have been silent for too long where they must not be."""
        with self._lock:
            silent = [stream for stream in self._streams | self._uploads if stream.overdue(now, idle_seconds)]
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
