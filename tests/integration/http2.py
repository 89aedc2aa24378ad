"""How far one direction of an HTTP/2 connection is: in frames, and in the gRPC messages inside its DATA frames.

Only the framing is read, never the HPACK headers: a frame is nine bytes of header and a length; a gRPC message is
five bytes of prefix and a length, cut into the DATA frames of its stream wherever gRPC liked.
"""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["PREFACE", "Meter", "Run", "Unit"]

Unit = Literal["frame", "message"]
Run = tuple[int, bool]
"""So many bytes, and whether they are bytes of a gRPC message."""

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER_BYTES: Final = 9
_PREFIX_BYTES: Final = 5
_DATA: Final = 0
_HEADERS: Final = 1
_RST_STREAM: Final = 3
_END_STREAM: Final = 1


class _Message:
    """The message that a stream is in the middle of: so many bytes of it, prefix included, and so many to come."""

    def __init__(self) -> None:
        self.size = 0
        self.left = _PREFIX_BYTES
        self.prefix = bytearray()
        self.body = bytearray()

    def take(self, data: bytes, *, keep: bool) -> bool:
        """Add bytes, never more than `left`; True if they complete the message."""
        in_prefix = self.size < _PREFIX_BYTES
        self.size += len(data)
        self.left -= len(data)
        if in_prefix:
            self.prefix += data
            if self.left == 0:
                self.left = int.from_bytes(self.prefix[1:])
        elif keep:
            self.body += data
        return self.left == 0


class Meter:
    """Counts what has gone by.

    Attributes:
        frame_lengths: of each whole frame, header included; the client's connection preface counts as one.
        message_lengths: of each whole gRPC message of whatever stream, prefix included.
        bodies: of the messages, from when `keeps_bodies` was set.
        ended_streams: ids of streams that this direction has ended, well or by a reset.
    """

    def __init__(self, preface_bytes: int = 0) -> None:
        """Start at the first byte of a connection."""
        self.frame_lengths: list[int] = []
        self.message_lengths: list[int] = []
        self.bodies: list[bytes] = []
        self.keeps_bodies = False
        self.ended_streams: set[int] = set()
        self._header = bytearray()
        self._left = preface_bytes
        self._frame_bytes = 0
        self._type = -1
        self._stream = 0
        self._open: dict[int, _Message] = {}
        self._current = _Message()

    def done(self, unit: Unit) -> int:
        """Count whole units."""
        return len(self.frame_lengths if unit == "frame" else self.message_lengths)

    def within(self, unit: Unit) -> int:
        """Count bytes of the unit under way, a message's prefix included."""
        return self._frame_bytes if unit == "frame" else self._current.size

    def next_run(self, available: int) -> Run:
        """Return how many of the next bytes can be advanced over at once, all of one kind."""
        if self._left == 0:  # a header is under way
            return min(available, _FRAME_HEADER_BYTES - len(self._header)), False
        if self._type == _DATA:
            return min(available, self._left, self._message().left), True
        return min(available, self._left), False

    def advance(self, data: bytes) -> None:
        """Go over the bytes of one run, or its first part."""
        self._frame_bytes += len(data)
        if self._left == 0:
            self._header += data
            if len(self._header) == _FRAME_HEADER_BYTES:
                self._open_frame()
            return
        if self._type == _DATA:
            self._take_message(data)
        self._left -= len(data)
        if self._left == 0:
            self._close_frame()

    def _open_frame(self) -> None:
        self._left = int.from_bytes(self._header[:3])
        self._type = self._header[3]
        self._stream = int.from_bytes(self._header[5:]) & 0x7FFFFFFF
        ends = self._type == _RST_STREAM or (self._type in (_DATA, _HEADERS) and bool(self._header[4] & _END_STREAM))
        if ends:
            self.ended_streams.add(self._stream)
        self._header.clear()
        if self._left == 0:
            self._close_frame()

    def _close_frame(self) -> None:
        self.frame_lengths.append(self._frame_bytes)
        self._frame_bytes = 0
        self._type = -1

    def _message(self) -> _Message:
        self._current = self._open.setdefault(self._stream, _Message())
        return self._current

    def _take_message(self, data: bytes) -> None:
        if self._message().take(data, keep=self.keeps_bodies):
            self.message_lengths.append(self._current.size)
            if self.keeps_bodies:
                self.bodies.append(bytes(self._current.body))
            del self._open[self._stream]
            self._current = _Message()
