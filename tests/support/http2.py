"""A client of HTTP/2 by hand: it opens calls, and sends and reads as little as a test says."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

__all__ = ["RawHttp2", "grpc_message"]

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 4, 6, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_INITIAL_WINDOW: Final = 4
_LARGEST_FRAME: Final = 16_384
_FIRST_WINDOW: Final = 65_535


def grpc_message(data: bytes) -> bytes:
    """Frame a message as gRPC does."""
    return b"\x00" + struct.pack(">I", len(data)) + data


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


def _text(text: str) -> bytes:
    """Encode a text of HPACK, without Huffman's code."""
    data = text.encode()
    if len(data) < 127:
        return bytes([len(data)]) + data
    length, encoded = len(data) - 127, bytearray([127])
    while length >= 128:
        encoded.append(length & 127 | 128)
        length >>= 7
    return bytes([*encoded, length]) + data


def _header_block(fields: Mapping[str, str]) -> bytes:
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields.items())


class RawHttp2:
    """One connection to a server in plaintext. A context manager."""

    def __init__(self, port: int, *, window: int | None = None) -> None:
        """Connect.

        Args:
            port: of loopback.
            window: the bytes of a response that the server may send before they are asked for; None for the default.
        """
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60.0)
        settings = b"" if window is None else struct.pack(">HI", _INITIAL_WINDOW, window)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
        self._next, self._unread = 1, b""
        self._stream_window = _FIRST_WINDOW
        self._windows = {0: _FIRST_WINDOW}  # of the connection, and what streams have beyond or below theirs

    def open(self, path: str, message: bytes | None = None, *, end: bool = True, **metadata: str) -> int:
        """Open a call and return its stream; without a message, nothing but its headers is sent."""
        stream, self._next = self._next, self._next + 2
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "x",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, _header_block(fields | metadata)))
        if message is not None:
            self.send(stream, message, end=end)
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send bytes of a call, whatever the server's window."""
        for begin in range(0, max(len(data), 1), _LARGEST_FRAME):
            part = data[begin : begin + _LARGEST_FRAME]
            last = end and begin + _LARGEST_FRAME >= len(data)
            self._socket.sendall(_frame(_DATA, _END_STREAM if last else 0, stream, part))

    def push(self, stream: int, data: bytes) -> None:
        """Send bytes of a call as the server's windows allow, reading what it sends meanwhile."""
        while data:
            own = self._stream_window + self._windows.setdefault(stream, 0)
            room = min(own, self._windows[0], len(data), _LARGEST_FRAME)
            if room <= 0:
                self.read()
                continue
            self._socket.sendall(_frame(_DATA, 0, stream, data[:room]))
            data = data[room:]
            for each in (0, stream):
                self._windows[each] -= room

    def read(self) -> tuple[int, int, bytes]:
        """Return the next frame's kind, stream and body; settings and pings are acknowledged.

        Raises:
            ConnectionError: the server closed the connection.
        """
        header = self._exactly(9)
        kind, flags, stream = header[3], header[4], int.from_bytes(header[5:9], "big")
        body = self._exactly(int.from_bytes(header[:3], "big"))
        if kind == _WINDOW_UPDATE:
            self._windows[stream] = self._windows.get(stream, 0) + int.from_bytes(body, "big")
        if kind == _SETTINGS and not flags & _ACK:
            settings = dict(struct.iter_unpack(">HI", body))
            self._stream_window = settings.get(_INITIAL_WINDOW, self._stream_window)
        if kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._socket.sendall(_frame(kind, _ACK, 0, body if kind == _PING else b""))
        return kind, stream, body

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        while len(self._unread) < size:
            if not (more := self._socket.recv(1 << 16)):
                raise ConnectionError("the server closed the connection")
            self._unread += more
        found, self._unread = self._unread[:size], self._unread[size:]
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
