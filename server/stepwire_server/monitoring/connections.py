"""The connections of an HTTP address: so many at a time, and none keeps its place by being slow with its request.

A request is a few lines that come at once. So where all places are taken, the connection that has been without a whole
request for longest gives up its place. One that is slow for longer than a bound ends anyway, however often it sends a
byte.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Connections", "RequestLines"]


class Connections:
    """The connections that have a thread. Thread-safe."""

    def __init__(self, most: int, request_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Have none yet.

        Args:
            most: the most connections at a time.
            request_seconds: the longest time from a connection to its whole request.
            clock: returns seconds.
        """
        self._most = most
        self._request_seconds = request_seconds
        self._clock = clock
        self._asking: dict[socket.socket, float] = {}  # from the oldest
        self._responding: set[socket.socket] = set()
        self._lock = threading.Lock()

    def enter(self, connection: socket.socket) -> bool:
        """Give a connection a place; False if every other one has brought its request, and gets its response."""
        displaced = None
        with self._lock:
            if len(self._asking) + len(self._responding) >= self._most:
                if (displaced := next(iter(self._asking), None)) is None:
                    return False
                del self._asking[displaced]
            self._asking[connection] = self._clock()
        if displaced is not None:
            _end(displaced)
        return True

    def asked(self, connection: socket.socket) -> None:
        """Note that a connection has brought its request."""
        with self._lock:
            if self._asking.pop(connection, None) is not None:
                self._responding.add(connection)

    def leave(self, connection: socket.socket) -> None:
        """End a connection."""
        with self._lock:
            self._asking.pop(connection, None)
            self._responding.discard(connection)

    def end_slow(self) -> None:
        """End the connections that have been without a whole request for too long."""
        before = self._clock() - self._request_seconds
        with self._lock:
            slow = [connection for connection, since in self._asking.items() if since < before]
            for connection in slow:
                del self._asking[connection]
        for connection in slow:
            _end(connection)


def _end(connection: socket.socket) -> None:
    """End a connection, whose thread notices and closes it."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # TLS would drop what its own thread is using


class RequestLines:
    """The lines of a request, up to a number of bytes together."""

    def __init__(self, file: Any, most_bytes: int) -> None:
        """Read lines of `file`."""
        self._file = file
        self._left = most_bytes

    def readline(self, limit: int) -> bytes:
        """Return the next line, or as many bytes of it.

        Raises:
            http.client.LineTooLong: the lines so far have more bytes than a request may have.
        """
        line: bytes = self._file.readline(min(limit, self._left + 1))
        self._left -= len(line)
        if self._left < 0:
            raise http.client.LineTooLong("request")
        return line

    def close(self) -> None:
        """Close the file."""
        self._file.close()
