"""A TCP proxy between a client and a server that does to a connection what networks do, exactly where a test says.

It can cut a connection after a number of HTTP/2 frames or gRPC messages and any number of bytes of the next one;
hold one direction until it is released; and strand what a client sends: the client sees its connection break while
its bytes are still on their way and reach the server much later.

Counting in frames and messages of the live connection, instead of replaying recorded byte counts, is what makes a
cut hit the boundary that it names: a window update more or less moves every byte count after it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from tests.integration.events import PATIENCE_SECONDS, Happenings
from tests.integration.http2 import PREFACE, Meter, Unit

__all__ = ["Cut", "Direction", "Proxy", "Stranded", "Traffic"]

Direction = Literal["up", "down"]
"""From client to server, or back."""

_BLOCK_BYTES = 256 << 10


class Cut(NamedTuple):
    """Where a connection breaks.

    Attributes:
        direction: whose units are counted.
        unit: HTTP/2 frames, or gRPC messages.
        after: whole units that are still delivered.
        extra_bytes: bytes of the following unit that are delivered too; all of it at most.
        abrupt: reset both ends and lose what they have not read, instead of closing them in order.
    """

    direction: Direction
    unit: Unit
    after: int
    extra_bytes: int = 0
    abrupt: bool = False


class Traffic(NamedTuple):
    """What one direction carried: the length of each frame and of each message with its prefix."""

    frames: list[int]
    messages: list[int]


class Stranded:
    """Bytes of a client that gave up on them, on a connection that the server still believes in."""

    def __init__(self, messages: int) -> None:
        """Wait for so many messages before the client's end breaks."""
        self.awaited = messages
        self.kept = bytearray()
        self.full = threading.Event()
        self._link: _Link | None = None

    def bind(self, link: _Link) -> None:
        """Belong to a connection."""
        self._link = link

    def deliver(self, last: Callable[[bytes], bool]) -> list[bytes]:
        """Let the bytes reach the server; returns the messages it answers with.

        Args:
            last: tells whether a message is the answer's last; the server may also end the stream before.
        """
        assert self._link is not None and self.full.wait(PATIENCE_SECONDS), "nothing was stranded"
        return self._link.deliver(bytes(self.kept), last)


class _Pump:
    """One direction of a connection."""

    def __init__(self, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.sink = sink
        self.meter = Meter(len(PREFACE) if direction == "up" else 0)
        self.sunk = False
        """What comes is counted and not passed on."""


class _Link:
    """One connection: two sockets, two pumps, and the fault that awaits it."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self.pumps: dict[Direction, _Pump] = {
            "up": _Pump("up", client, server),
            "down": _Pump("down", server, client),
        }
        self.open = True
        self._cut: Cut | None = None
        self._base = 0
        self.stranded: Stranded | None = None
        self._strand_base = 0
        self._running = len(self.pumps)
        self._abrupt = False
        self._threads = [
            threading.Thread(target=self._pump, args=(pump,), name=f"proxy-{pump.direction}", daemon=True)
            for pump in self.pumps.values()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def arm(self, cut: Cut) -> None:
        """Await a cut, counted from now. The proxy's lock is held."""
        self._cut = cut
        self._base = self.pumps[cut.direction].meter.done(cut.unit)

    def disarm(self) -> None:
        """Await nothing. The proxy's lock is held."""
        self._cut = None

    def sever(self) -> None:
        """Break both ends. The proxy's lock is held."""
        self._hit()
        for end in (self._client, self._server):
            _shut(end, socket.SHUT_RDWR)

    def strand(self, stranded: Stranded) -> None:
        """Keep what the client sends from now on. The proxy's lock is held."""
        self.stranded = stranded
        self._strand_base = self.pumps["up"].meter.done("message")
        self.pumps["down"].sunk = self.pumps["down"].meter.keeps_bodies = True
        stranded.bind(self)

    def deliver(self, data: bytes, last: Callable[[bytes], bool]) -> list[bytes]:
        """Send to the server what was kept, and wait for what it says."""
        meter, changed = self.pumps["down"].meter, self._proxy.changed
        with changed:
            ended = len(meter.ended_streams)
        self._server.sendall(data)
        with changed:
            done = changed.wait_for(
                lambda: any(map(last, meter.bodies)) or len(meter.ended_streams) > ended, PATIENCE_SECONDS
            )
            assert done, "the server said nothing to stranded messages"
        _shut(self._server, socket.SHUT_RDWR)
        return meter.bodies

    def close(self) -> None:
        """End both sockets and wait for the pumps."""
        with self._proxy.changed:
            self.open = False
            for end in (self._client, self._server):
                _shut(end, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    # --- in the pumps' threads -----------------------------------------------------------------------------

    def _pump(self, pump: _Pump) -> None:
        with contextlib.suppress(OSError):
            while data := pump.source.recv(_BLOCK_BYTES):
                self._proxy.wait_released(pump.direction)
                with self._proxy.changed:
                    passed, cut = self._metered(pump, data)
                    self._proxy.changed.notify_all()
                if passed:
                    pump.sink.sendall(passed)
                if cut is not None:
                    self._break(cut)
        self._finish(pump)

    def _metered(self, pump: _Pump, data: bytes) -> tuple[bytes, Cut | None]:
        """Count bytes one run after the other; returns what to pass on and the cut that comes after it."""
        if not self.open:
            return b"", None
        position = 0
        while True:
            cut = self._cut
            if cut is not None and cut.direction == pump.direction and self._reached(cut, pump.meter):
                self._hit()
                return data[:position], cut
            if position == len(data):
                break
            length, of_message = pump.meter.next_run(len(data) - position)
            if cut is not None and cut.direction == pump.direction and (cut.unit == "frame" or of_message):
                length = min(length, self._room(cut, pump.meter, length))
            pump.meter.advance(data[position : position + length])
            position += length
        if pump.direction == "up" and self.stranded is not None:
            return self._keep(data), None
        return (b"", None) if pump.sunk else (data, None)

    def _reached(self, cut: Cut, meter: Meter) -> bool:
        done = meter.done(cut.unit) - self._base
        return done > cut.after or (done == cut.after and meter.within(cut.unit) >= cut.extra_bytes)

    def _room(self, cut: Cut, meter: Meter, length: int) -> int:
        """Return how many bytes may pass before the cut is reached."""
        if meter.done(cut.unit) - self._base < cut.after:
            return length
        return cut.extra_bytes - meter.within(cut.unit)

    def _hit(self) -> None:
        """Count the cut and await no other. The proxy's lock is held."""
        self._cut = None
        self.open = False
        self._proxy.cuts += 1

    def _keep(self, data: bytes) -> bytes:
        """Keep bytes of a stranding client, and break its end when all is there. The proxy's lock is held."""
        assert self.stranded is not None
        self.stranded.kept += data
        if self.pumps["up"].meter.done("message") - self._strand_base >= self.stranded.awaited:
            _shut(self._client, socket.SHUT_RDWR)
            self.stranded.full.set()
        return b""

    def _break(self, cut: Cut) -> None:
        """Close in order (both ends read what was passed on, then the end), or reset both."""
        self._abrupt = cut.abrupt
        for end in (self._client, self._server):
            _shut(end, socket.SHUT_RD if cut.abrupt else socket.SHUT_WR)

    def _finish(self, pump: _Pump) -> None:
        """Pass the end on; the last pump closes the sockets."""
        stranding = self.stranded is not None and pump.direction == "up"
        with self._proxy.changed:
            self._running -= 1
            last = self._running == 0
            if not stranding:
                self.open = False
            self._proxy.changed.notify_all()
        if not stranding and not self._abrupt:
            _shut(pump.sink, socket.SHUT_WR)
        if last:
            self._close_sockets()

    def _close_sockets(self) -> None:
        with self._proxy.changed:
            for end in (self._client, self._server):
                if self._abrupt:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()


class Proxy:
    """Listens on a free port of the loopback and passes everything on, until a test says otherwise.

    Attributes:
        target: where clients connect.
        upstream: where new connections are passed on to; None for nowhere.
        refused: connections that were closed at once, because nobody was there.
        cuts: cuts that have hit an open connection.
        changed: guards all of the proxy's state and tells of every change of it.
    """

    def __init__(self, upstream: str) -> None:
        """Listen."""
        self.upstream: str | None = upstream
        self.refused = Happenings()
        self.cuts = 0
        self.changed = threading.Condition()
        self._awaiting: deque[Cut] = deque()
        self._links: list[_Link] = []
        self._released: dict[Direction, threading.Event] = {"up": threading.Event(), "down": threading.Event()}
        self._holding: dict[Direction, threading.Event] = {"up": threading.Event(), "down": threading.Event()}
        for event in self._released.values():
            event.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name="proxy-accept", daemon=True)
        self._thread.start()

    # --- faults --------------------------------------------------------------------------------------------

    def arm(self, first: Cut, *following: Cut) -> None:
        """Await cuts: one on each connection.

        Args:
            first: on the open connection, counted from now; on the next one, if none is open.
            following: each on the next new connection, counted from its start.
        """
        with self.changed:
            link = self._open_link()
            self._awaiting = deque((first, *following))
            if link is not None:
                link.arm(self._awaiting.popleft())

    def disarm(self) -> None:
        """Await no cut."""
        with self.changed:
            self._awaiting.clear()
            for link in self._links:
                link.disarm()

    def hold(self, direction: Direction) -> None:
        """Keep back what comes in one direction, until it is released."""
        self._holding[direction].clear()
        self._released[direction].clear()

    def wait_held(self, direction: Direction) -> None:
        """Wait until something is being kept back."""
        assert self._holding[direction].wait(PATIENCE_SECONDS), f"nothing came {direction}"

    def release(self, direction: Direction) -> None:
        """Pass on what was kept back and what follows."""
        self._released[direction].set()

    def sever(self) -> None:
        """Break the open connection now, and lose what is kept back."""
        with self.changed:
            link = self._open_link()
            assert link is not None, "no connection is open"
            link.sever()
        for event in self._released.values():
            event.set()

    def strand(self, messages: int) -> Stranded:
        """Keep the next messages of the open connection's client, then break the client's end of it alone."""
        stranded = Stranded(messages)
        with self.changed:
            link = self._open_link()
            assert link is not None, "no connection is open"
            link.strand(stranded)
        return stranded

    # --- what happens --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def recording(self) -> Iterator[dict[Direction, Traffic]]:
        """Record what the open connection carries in a block, for reading after it."""
        with self.changed:
            link = self._open_link()
            assert link is not None, "no connection is open"
            meters = {direction: pump.meter for direction, pump in link.pumps.items()}
            starts = {direction: (m.done("frame"), m.done("message")) for direction, m in meters.items()}
        traffic: dict[Direction, Traffic] = {}
        yield traffic
        with self.changed:
            for direction, meter in meters.items():
                frames, messages = starts[direction]
                traffic[direction] = Traffic(meter.frame_lengths[frames:], meter.message_lengths[messages:])

    def wait_released(self, direction: Direction) -> None:
        """Wait in a pump while its direction is held."""
        released = self._released[direction]
        if not released.is_set():
            self._holding[direction].set()
            released.wait()

    def close(self) -> None:
        """Break every connection and stop listening. Closing twice is harmless."""
        for event in self._released.values():
            event.set()
        _shut(self._listener, socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for link in self._links:
            link.close()

    def __enter__(self) -> Proxy:
        """Use the proxy for a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _open_link(self) -> _Link | None:
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
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = _Link(self, client, server)
        with self.changed:
            self._links.append(link)
            if self._awaiting:
                link.arm(self._awaiting.popleft())
        link.start()


def _dial(upstream: str | None) -> socket.socket | None:
    if upstream is None:
        return None
    host, _, port = upstream.rpartition(":")
    try:
        return socket.create_connection((host, int(port)))
    except OSError:
        return None


def _shut(end: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # not connected any more
        end.shutdown(how)
