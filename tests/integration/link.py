"""One connection through the proxy: what goes by is counted, and at the byte that a test names it is cut or kept."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal, NamedTuple

from tests.integration.events import PATIENCE_SECONDS
from tests.integration.http2 import PREFACE, Meter, Unit

__all__ = ["Cut", "Direction", "Link", "Stranded", "Traffic", "Valves", "shut"]

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
        self._link: Link | None = None

    def bind(self, link: Link) -> None:
        """Belong to a connection."""
        self._link = link

    def deliver(self, last: Callable[[bytes], bool]) -> list[bytes]:
        """Let the bytes reach the server; returns the messages it answers with.

        Args:
            last: tells whether a message is the answer's last; the server may also end the stream before.
        """
        assert self._link is not None and self.full.wait(PATIENCE_SECONDS), "nothing was stranded"
        return self._link.deliver(bytes(self.kept), last)


class Valves:
    """What all connections of a proxy share.

    Attributes:
        changed: guards their state and tells of every change of it.
        cuts: cuts that have hit an open connection.
    """

    def __init__(self) -> None:
        """Hold nothing back."""
        self.changed = threading.Condition()
        self.cuts = 0
        self._open: dict[Direction, threading.Event] = {"up": threading.Event(), "down": threading.Event()}
        self._used: dict[Direction, threading.Event] = {"up": threading.Event(), "down": threading.Event()}
        self.release("up", "down")

    def hold(self, direction: Direction) -> None:
        """Keep back what comes in one direction, until it is released."""
        self._used[direction].clear()
        self._open[direction].clear()

    def wait_held(self, direction: Direction) -> None:
        """Wait until something is being kept back."""
        assert self._used[direction].wait(PATIENCE_SECONDS), f"nothing came {direction}"

    def release(self, *directions: Direction) -> None:
        """Pass on what was kept back and what follows."""
        for direction in directions:
            self._open[direction].set()

    def wait_open(self, direction: Direction) -> None:
        """Wait in a pump while its direction is held."""
        if not self._open[direction].is_set():
            self._used[direction].set()
            self._open[direction].wait()


class _Pump:
    """One direction of a connection."""

    def __init__(self, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.sink = sink
        self.meter = Meter(len(PREFACE) if direction == "up" else 0)
        self.sunk = False
        """What comes is counted and not passed on."""


class Link:
    """One connection: two sockets, two pumps, and the fault that awaits it."""

    def __init__(self, valves: Valves, client: socket.socket, server: socket.socket) -> None:
        self._valves = valves
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
        """Await a cut, counted from now. The lock is held."""
        self._cut = cut
        self._base = self.pumps[cut.direction].meter.done(cut.unit)

    def disarm(self) -> None:
        """Await nothing. The lock is held."""
        self._cut = None

    def sever(self) -> None:
        """Break both ends. The lock is held."""
        self._hit()
        for end in (self._client, self._server):
            shut(end, socket.SHUT_RDWR)

    def strand(self, stranded: Stranded) -> None:
        """Keep what the client sends from now on. The lock is held."""
        self.stranded = stranded
        self._strand_base = self.pumps["up"].meter.done("message")
        self.pumps["down"].sunk = self.pumps["down"].meter.keeps_bodies = True
        stranded.bind(self)

    def deliver(self, data: bytes, last: Callable[[bytes], bool]) -> list[bytes]:
        """Send to the server what was kept, and wait for what it says."""
        meter, changed = self.pumps["down"].meter, self._valves.changed
        with changed:
            ended = len(meter.ended_streams)
        self._server.sendall(data)
        with changed:
            done = changed.wait_for(
                lambda: any(map(last, meter.bodies)) or len(meter.ended_streams) > ended, PATIENCE_SECONDS
            )
            assert done, "the server said nothing to stranded messages"
        shut(self._server, socket.SHUT_RDWR)
        return meter.bodies

    def close(self) -> None:
        """End both sockets and wait for the pumps."""
        with self._valves.changed:
            self.open = False
            for end in (self._client, self._server):
                shut(end, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    # --- in the pumps' threads -----------------------------------------------------------------------------

    def _pump(self, pump: _Pump) -> None:
        with contextlib.suppress(OSError):
            while data := pump.source.recv(_BLOCK_BYTES):
                self._valves.wait_open(pump.direction)
                with self._valves.changed:
                    passed, cut = self._metered(pump, data)
                    self._valves.changed.notify_all()
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
        """Count the cut and await no other. The lock is held."""
        self._cut = None
        self.open = False
        self._valves.cuts += 1

    def _keep(self, data: bytes) -> bytes:
        """Keep bytes of a stranding client, and break its end when all is there. The lock is held."""
        assert self.stranded is not None
        self.stranded.kept += data
        if self.pumps["up"].meter.done("message") - self._strand_base >= self.stranded.awaited:
            shut(self._client, socket.SHUT_RDWR)
            self.stranded.full.set()
        return b""

    def _break(self, cut: Cut) -> None:
        """Close in order (both ends read what was passed on, then the end), or reset both."""
        self._abrupt = cut.abrupt
        for end in (self._client, self._server):
            shut(end, socket.SHUT_RD if cut.abrupt else socket.SHUT_WR)

    def _finish(self, pump: _Pump) -> None:
        """Pass the end on; the last pump closes the sockets."""
        stranding = self.stranded is not None and pump.direction == "up"
        with self._valves.changed:
            self._running -= 1
            last = self._running == 0
            if not stranding:
                self.open = False
            self._valves.changed.notify_all()
        if not stranding and not self._abrupt:
            shut(pump.sink, socket.SHUT_WR)
        if last:
            self._close_sockets()

    def _close_sockets(self) -> None:
        with self._valves.changed:
            for end in (self._client, self._server):
                if self._abrupt:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()


def shut(end: socket.socket, how: int) -> None:
    """Shut a socket down, if it is still connected."""
    with contextlib.suppress(OSError):
        end.shutdown(how)
