"""Bulk messages, read and written around their payload.

A protobuf message with a `bytes` field costs three to four copies to build and two to read. Yet the wire form
is only: the other fields, one tag, one length, the bytes. So the sender writes those few bytes itself in front
of an uninitialised buffer and lets the encoder fill it; the receiver cuts the payload out by walking the
top-level fields, and gives what is left to the protobuf parser. Any order of fields and any unknown field is
read correctly, because what is left is itself the same message without its payload; and what is written is
ordinary protobuf to everyone else.

`padding` (ignored by readers) makes the payload start at a multiple of 16 in the message. CPython's `bytes`
start at a multiple of 16 in memory, so both sides see aligned arrays.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError, Reason

__all__ = ["Frame", "FrameBuffer", "read_frame"]

_PADDING_TAG: Final = 14 << 3 | 2
_PAYLOAD_TAG: Final = 15 << 3 | 2
_ALIGNMENT: Final = 16
_MAX_VARINT_BYTES: Final = 10

# Distance from a bytes object to its first byte: the header without the trailing NUL.
_BYTES_HEADER: Final = bytes.__basicsize__ - 1
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)
_new_bytes.restype = ctypes.py_object


class _Message(Protocol):
    """The part of a generated message that frames need."""

    def SerializeToString(self) -> bytes: ...


_M = TypeVar("_M", covariant=True)


class _Parser(Protocol[_M]):
    """A generated message class."""

    def FromString(self, data: bytes, /) -> _M: ...


class Frame(NamedTuple):
    """A received message.

    Attributes:
        message: every field but the payload.
        payload: `(n,) uint8` view into the received bytes, or a copy where a view would keep more than twice as many
            alive; empty when there is none.
    """

    message: Any
    payload: npt.NDArray[np.uint8]


class FrameBuffer:
    """An outgoing message whose payload is still to be written.

    The bytes object is made uninitialised and written through its address. That is safe here for the reason
    it is in C: nobody else has seen the object yet. `data` must not be read before the payload is complete.
    """

    __slots__ = ("__array_interface__", "data", "payload_start")

    def __init__(self, header: _Message, payload_bytes: int) -> None:
        """Lay out a message with `header`'s fields and room for the payload."""
        prefix = _prefix(header.SerializeToString(), payload_bytes)
        total = len(prefix) + payload_bytes
        self.payload_start = len(prefix)
        self.data: bytes = _new_bytes(None, total)
        # NumPy's own protocol for "an array at this address"; it keeps `self`, and so the bytes, alive.
        self.__array_interface__ = {
            "data": (id(self.data) + _BYTES_HEADER, False),
            "shape": (total,),
            "typestr": "|u1",
            "version": 3,
        }
        np.asarray(self)[: self.payload_start] = np.frombuffer(prefix, np.uint8)

    def payload(self, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return the payload as a writable 1-D array."""
        return np.asarray(self)[self.payload_start :].view(dtype)


def read_frame(kind: _Parser[Any], data: bytes) -> Frame:
    """Split a received message into its fields and its payload, without copying the payload.

    Raises:
        InvalidRequestError: not a message of this kind (INVALID_FRAME).
    """
    start, end, payload = 0, len(data), (0, 0)
    rest: list[bytes] = []
    position = 0
    try:
        while position < end:
            field_start = position
            tag, position = _varint(data, position)
            position, body = _skip(data, position, tag & 7)
            if tag == _PAYLOAD_TAG:
                rest.append(data[start:field_start])
                payload, start = (body, position), position
        rest.append(data[start:])
        message = kind.FromString(b"".join(rest) if len(rest) > 1 else rest[0])
    except Exception as error:  # protobuf's DecodeError has no importable common base across versions
        raise InvalidRequestError(
            f"message of {end} bytes cannot be decoded: {error}", reason=Reason.INVALID_FRAME
        ) from error
    view = np.frombuffer(data, np.uint8)[payload[0] : payload[1]]
    return Frame(message, view if 2 * view.size >= end else view.copy())


def _prefix(fields: bytes, payload_bytes: int) -> bytes:
    tail = bytes([_PAYLOAD_TAG]) + _encode_varint(payload_bytes)
    gap = -(len(fields) + len(tail)) % _ALIGNMENT
    if gap == 0:
        return fields + tail
    if gap == 1:  # a padding field takes at least two bytes
        gap += _ALIGNMENT
    return fields + bytes([_PADDING_TAG, gap - 2]) + bytes(gap - 2) + tail


def _skip(data: bytes, position: int, wire_type: int) -> tuple[int, int]:
    """Return where a field ends and where its body starts."""
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
