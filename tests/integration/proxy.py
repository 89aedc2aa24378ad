"""A proxy between a client and a server that does to a connection, TCP or Unix, what networks do, where a test says.

It can cut a connection after a number of HTTP/2 frames or gRPC messages and any number of bytes of the next one;
hold one direction until it is released; and strand what a client sends: the client sees its connection break while
its bytes are still on their way and reach the server much later.

Counting in frames and messages of the live connection, instead of replaying recorded byte counts, is what makes a
cut hit the boundary that it names: a window update more or less moves every byte count after it.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Iterator

from tests.integration.events import Happenings
from tests.integration.link import Cut, Direction, Link, Stranded, Traffic, Valves, shut

__all__ = ["Proxy"]

_UNIX = "unix:"


class Proxy:
    """Listens, over TCP or on a Unix socket, as its upstream does, and passes everything on, until told otherwise.

    Attributes:
        target: where clients connect.
        upstream: where new connections are passed on to; None for nowhere.
        refused: connections that were closed at once, because nobody was there.
    """

    def __init__(self, upstream: str) -> None:
        """Listen."""
        self.upstream: str | None = upstream
        self.refused = Happenings()
        self._valves = Valves()
        self._awaiting: deque[Cut] = deque()
        self._links: list[Link] = []
        self._folder = tempfile.TemporaryDirectory(prefix="proxy-")
        if upstream.startswith(_UNIX):
            path = f"{self._folder.name}/proxy.sock"
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
            self._listener.listen()
            self.target = _UNIX + path
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name="proxy-accept", daemon=True)
        self._thread.start()

    @property
    def cuts(self) -> int:
        """Cuts that have hit an open connection."""
        return self._valves.cuts

    # --- faults --------------------------------------------------------------------------------------------

    def arm(self, first: Cut, *following: Cut) -> None:
        """Await cuts: one on each connection.

        Args:
            first: on the open connection, counted from now; on the next one, if none is open.
            following: each on the next new connection, counted from its start.
        """
        with self._valves.changed:
            link = self._open_link()
            self._awaiting = deque((first, *following))
            if link is not None:
                link.arm(self._awaiting.popleft())

    def disarm(self) -> None:
        """Await no cut."""
        with self._valves.changed:
            self._awaiting.clear()
            for link in self._links:
                link.disarm()

    def hold(self, direction: Direction) -> None:
        """Keep back what comes in one direction, until it is released."""
        self._valves.hold(direction)

    def wait_held(self, direction: Direction) -> None:
        """Wait until something is being kept back."""
        self._valves.wait_held(direction)

    def release(self, direction: Direction) -> None:
        """Pass on what was kept back and what follows."""
        self._valves.release(direction)

    def sever(self) -> None:
        """Break the open connection now, and lose what is kept back."""
        with self._valves.changed:
            link = self._open_link()
            assert link is not None, "no connection is open"
            link.sever()
        self._valves.release("up", "down")

    def strand(self, messages: int) -> Stranded:
        """Keep the next messages of the open connection's client, then break the client's end of it alone."""
        stranded = Stranded(messages)
        with self._valves.changed:
            link = self._open_link()
            assert link is not None, "no connection is open"
            link.strand(stranded)
        return stranded

    # --- what happens --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def recording(self) -> Iterator[dict[Direction, Traffic]]:
        """Record what the open connection carries in a block, for reading after it."""
        with self._valves.changed:
            link = self._open_link()
            assert link is not None, "no connection is open"
            meters = {direction: pump.meter for direction, pump in link.pumps.items()}
            starts = {direction: (m.done("frame"), m.done("message")) for direction, m in meters.items()}
        traffic: dict[Direction, Traffic] = {}
        yield traffic
        with self._valves.changed:
            for direction, meter in meters.items():
                frames, messages = starts[direction]
                traffic[direction] = Traffic(meter.frame_lengths[frames:], meter.message_lengths[messages:])

    def close(self) -> None:
        """Break every connection and stop listening. Closing twice is harmless."""
        self._valves.release("up", "down")
        shut(self._listener, socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for link in self._links:
            link.close()
        self._folder.cleanup()

    def __enter__(self) -> Proxy:
        """Use the proxy for a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _open_link(self) -> Link | None:
        return next((link for link in reversed(self._links) if link.open and link.stranded is None), None)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        if (server := _dial(self.upstream)) is None:
            client.close()
            self.refused.note()
            return
        for end in (client, server):
            if end.family != socket.AF_UNIX:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(self._valves, client, server)
        with self._valves.changed:
            self._links.append(link)
            if self._awaiting:
                link.arm(self._awaiting.popleft())
        link.start()


def _dial(upstream: str | None) -> socket.socket | None:
    if upstream is None:
        return None
    if upstream.startswith(_UNIX):
        return _dial_unix(upstream.removeprefix(_UNIX))
    host, _, port = upstream.rpartition(":")
    try:
        return socket.create_connection((host, int(port)))
    except OSError:
        return None


def _dial_unix(path: str) -> socket.socket | None:
    end = socket.socket(socket.AF_UNIX)
    try:
        end.connect(path)
    except OSError:
        end.close()
        return None
    return end
