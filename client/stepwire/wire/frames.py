"""Bulk messages, read and written around their payload.

A protobuf message with a `bytes` field costs three to four copies to build and two to read. Yet the wire form is only
the other fields, one tag, one length and the bytes. So the sender writes those few bytes in front of an uninitialised
buffer, and the encoder fills the buffer. The receiver finds the payload by a walk over the top-level fields, and gives
the other bytes to the protobuf parser. Fields in any order and unknown fields are read correctly, because the other
bytes are the same message without its payload. The written message is ordinary protobuf for every other reader.

`padding` (ignored by readers) makes the payload start at a multiple of 16 in the message. CPython's `bytes` start at a
multiple of 16 in memory, so the arrays of both sides are aligned.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError, Reason

__all__ = ["Frame", "FrameBuffer", "read_frame", "read_message", "whole_message"]

_PADDING_TAG: Final = 14 << 3 | 2
_PAYLOAD_TAG: Final = 15 << 3 | 2
_ALIGNMENT: Final = 16
# Up to this size the protobuf library's copies cost less than the walk around them.
_SMALL_BYTES: Final = 32 << 10
_MAX_VARINT_BYTES: Final = 10

# Distance from a bytes object to its first byte: the header without the trailing NUL.
_BYTES_HEADER: Final = bytes.__basicsize__ - 1
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)
_new_bytes.restype = ctypes.py_object


class _Message(Protocol):
    """The methods of a generated message that frames need."""

    def SerializeToString(self) -> bytes: ...


_M = TypeVar("_M", covariant=True)


class _Parser(Protocol[_M]):
    """A generated message class."""

    def FromString(self, data: bytes, /) -> _M: ...


class Frame(NamedTuple):
    """A received message.

    Attributes:
        message: every field but the payload.
        payload: `(n,) uint8`, empty without a payload. A view into the received bytes, or a copy if a view would keep
            more than twice as many bytes alive.
    """

    message: Any
    payload: npt.NDArray[np.uint8]


class FrameBuffer:
    """An outgoing message with a payload that is still to be written: fill `payload`, then call `finish`."""

    def __init__(self, header: _Message, payload_bytes: int) -> None:
        """Lay out a message with `header`'s fields and space for the payload."""
        self._header = header
        self._frame: bytes | None = None
        if payload_bytes <= _SMALL_BYTES:
            self._payload = np.empty(payload_bytes, np.uint8)
        else:
            self._frame, self._payload = _uninitialised(
                _prefix(header.SerializeToString(), payload_bytes), payload_bytes
            )

    def payload(self, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return the payload as a writable 1-D array."""
        return self._payload.view(dtype)

    def finish(self) -> bytes:
        """Return the message; the payload must be complete."""
        if self._frame is not None:
            return self._frame
        return _joined(self._header, self._payload)


def whole_message(header: _Message, payload: npt.NDArray[Any]) -> bytes:
    """Return a message with `header`'s fields and a complete payload, `(n,)` and contiguous."""
    if payload.nbytes <= _SMALL_BYTES:
        return _joined(header, payload)
    frame = FrameBuffer(header, payload.nbytes)
    frame.payload(payload.dtype)[:] = payload
    return frame.finish()


def _joined(header: _Message, payload: npt.NDArray[Any]) -> bytes:
    """Return a message of a header and a payload: one copy of the payload, where a message with the field needs two."""
    return b"".join((header.SerializeToString(), _payload_start(payload.nbytes), payload.tobytes()))


class _Memory:
    """NumPy's protocol for "an array at this address". The array keeps this object alive, and with it the `owner`."""

    def __init__(self, owner: bytes) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "data": (id(owner) + _BYTES_HEADER, False),
            "shape": (len(owner),),
            "typestr": "|u1",
            "version": 3,
        }


def _uninitialised(prefix: bytes, payload_bytes: int) -> tuple[bytes, npt.NDArray[np.uint8]]:
    """Return a new bytes object that starts with `prefix`, and a writable view of the rest.

    Writing to a bytes object is safe here for the same reason as in C: no other code has the object before it is
    complete.
    """
    frame: bytes = _new_bytes(None, len(prefix) + payload_bytes)
    whole = np.asarray(_Memory(frame))
    whole[: len(prefix)] = np.frombuffer(prefix, np.uint8)
    return frame, whole[len(prefix) :]


def read_frame(kind: _Parser[Any], data: bytes) -> Frame:
    """Return the fields and the payload of a received message. Only a small payload is copied.

    Raises:
        InvalidRequestError: the bytes are not a message of this kind (INVALID_FRAME).
    """
    if len(data) <= _SMALL_BYTES:
        message = read_message(kind, data)
        return Frame(message, np.frombuffer(message.payload, np.uint8))
    try:
        return _cut_out_payload(kind, data)
    except Exception as error:
        raise _undecodable(data, error) from error


def read_message(kind: _Parser[_M], data: bytes) -> _M:
    """Parse a received message with its payload.

    Raises:
        InvalidRequestError: the bytes are not a message of this kind (INVALID_FRAME).
    """
    try:
        return kind.FromString(data)
    except Exception as error:  # protobuf's DecodeError has no importable common base across versions
        raise _undecodable(data, error) from error


def _undecodable(data: bytes, error: Exception) -> InvalidRequestError:
    return InvalidRequestError(f"message of {len(data)} bytes cannot be decoded: {error}", reason=Reason.INVALID_FRAME)


def _cut_out_payload(kind: _Parser[Any], data: bytes) -> Frame:
    start, payload = 0, (0, 0)
    rest: list[bytes] = []
    position = 0
    while position < len(data):
        field_start = position
        tag, position = _varint(data, position)
        position, body = _skip(data, position, tag & 7)
        if tag == _PAYLOAD_TAG:
            rest.append(data[start:field_start])
            payload, start = (body, position), position
    rest.append(data[start:])
    view = np.frombuffer(data, np.uint8)[payload[0] : payload[1]]
    return Frame(kind.FromString(b"".join(rest)), view if 2 * view.size >= len(data) else view.copy())


def _prefix(fields: bytes, payload_bytes: int) -> bytes:
    tail = _payload_start(payload_bytes)
    gap = -(len(fields) + len(tail)) % _ALIGNMENT
    if gap == 0:
        return fields + tail
    if gap == 1:  # a padding field has at least two bytes
        gap += _ALIGNMENT
    return fields + bytes([_PADDING_TAG, gap - 2]) + bytes(gap - 2) + tail


@functools.lru_cache(64)
def _payload_start(payload_bytes: int) -> bytes:
    """Return the tag and the length before the payload's bytes; nothing for an empty payload."""
    return bytes([_PAYLOAD_TAG]) + _encode_varint(payload_bytes) if payload_bytes else b""


def _skip(data: bytes, position: int, wire_type: int) -> tuple[int, int]:
    """Return the end of a field and the start of its body."""
    if wire_type == 0:
        return _varint(data, position)[1], position
    if wire_type == 1:
        return _within(data, position + 8), position
    if wire_type == 2:
        length, body = _varint(data, position)
        return _within(data, body + length), body
    if wire_type == 5:
        return _within(data, position + 4), position
    raise ValueError(f"wire type {wire_type} at byte {position}")


def _within(data: bytes, position: int) -> int:
    if position > len(data):
        raise ValueError(f"a field ends at byte {position} of {len(data)}")
    return position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    value, shift = byte & 0x7F, 7
    for offset in range(1, _MAX_VARINT_BYTES):
        byte = data[position + offset]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + offset + 1
        shift += 7
    raise ValueError(f"varint longer than {_MAX_VARINT_BYTES} bytes at byte {position}")


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
