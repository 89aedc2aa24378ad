"""One connection of HTTP/2 by hand: it opens calls, sends what it may, and reads nothing of what comes back.

gRPC's own clients finish their messages and read their responses; an attacker does neither.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Final

__all__ = ["RawHttp2", "grpc_message"]

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 4, 6, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_INITIAL_WINDOW: Final = 4
_LARGEST_FRAME: Final = 16_384
_FIRST_WINDOW: Final = 65_535


def grpc_message(data: bytes, declared: int | None = None) -> bytes:
    """Frame a message as gRPC does; `declared` is the size that it pretends to have."""
    return b"\x00" + struct.pack(">I", len(data) if declared is None else declared) + data


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


def _field(name: str, value: str) -> bytes:
    """Encode a header; both texts have fewer than 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class RawHttp2:
    """One connection in plaintext."""

    def __init__(self, target: str, *, window: int = _FIRST_WINDOW) -> None:
        """Connect; the server may send `window` bytes of each response."""
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=10.0)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW, window)))
        self._next, self._unread = 1, b""
        self._room, self._initial, self._rooms = _FIRST_WINDOW, _FIRST_WINDOW, dict[int, int]()

    def open(self, path: str, message: bytes = b"", *, end: bool = False) -> int:
        """Open a call, send its message as far as the server takes it at once, and return its stream."""
        stream, self._next = self._next, self._next + 2
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
        fields["content-type"] = "application/grpc"
        block = b"".join(_field(name, value) for name, value in fields.items())
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, block))
        self._rooms[stream] = 0
        if message:
            self.send(stream, message, end=end)
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send bytes of a call, as far as the server takes them at once."""
        sent = 0
        while sent < len(data):
            self.read(0.0)
            room = min(self._room, self._initial + self._rooms.get(stream, 0), _LARGEST_FRAME)
            if room <= 0:
                if not self.read(0.05):
                    return
                continue
            part = data[sent : sent + room]
            sent += len(part)
            last = end and sent == len(data)
            self._socket.sendall(_frame(_DATA, _END_STREAM if last else 0, stream, part))
            self._room -= len(part)
            self._rooms[stream] = self._rooms.get(stream, 0) - len(part)

    def read(self, seconds: float) -> bool:
        """Read frames that are there, or come in time; tell whether any was."""
        self._socket.settimeout(seconds or 1e-4)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            if not (data := self._socket.recv(1 << 20)):
                raise ConnectionError("the server closed the connection")
            self._unread += data
        self._socket.settimeout(10.0)
        found = False
        while len(self._unread) >= 9 and len(self._unread) >= 9 + (size := int.from_bytes(self._unread[:3], "big")):
            kind, flags, stream = self._unread[3], self._unread[4], int.from_bytes(self._unread[5:9], "big")
            body, self._unread = self._unread[9 : 9 + size], self._unread[9 + size :]
            self._note(kind, flags, stream, body)
            found = True
        return found

    def _note(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind == _WINDOW_UPDATE:
            more = int.from_bytes(body, "big")
            if stream:
                self._rooms[stream] = self._rooms.get(stream, 0) + more
            else:
                self._room += more
        elif kind == _SETTINGS and not flags & _ACK:
            for at in range(0, len(body), 6):
                name, value = struct.unpack(">HI", body[at : at + 6])
                if name == _INITIAL_WINDOW:
                    self._initial = value
            self._socket.sendall(_frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self._socket.sendall(_frame(_PING, _ACK, 0, body))

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()
