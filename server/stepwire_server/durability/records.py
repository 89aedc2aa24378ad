"""The bytes of the log: headers of records and heads of segments, their checksums and their bounds. No file is read."""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple, TypeAlias

import google_crc32c
import numpy as np
import numpy.typing as npt

__all__ = [
    "BLOCK_BYTES",
    "FORMAT",
    "HEADER_BYTES",
    "HEAD_BYTES",
    "MOST_META_BYTES",
    "MOST_PAYLOAD_BYTES",
    "RECORD_MAGIC",
    "UNIT_BYTES",
    "Bytes",
    "Header",
    "Kind",
    "LogPosition",
    "Record",
    "SegmentHead",
    "as_array",
    "chained",
    "decode_head",
    "decode_header",
    "encode_head",
    "encode_header",
    "record_bytes",
    "require_writable",
    "rounded_up",
]

RECORD_MAGIC: Final = b"SWR1"
SEGMENT_MAGIC: Final = b"SWS1"
FORMAT: Final = 1
UNIT_BYTES: Final = 512  # records begin at its multiples
BLOCK_BYTES: Final = 4096  # and what follows a sync at those of this
HEADER_BYTES: Final = 80
HEAD_BYTES: Final = 512
MOST_META_BYTES: Final = 1 << 26
MOST_PAYLOAD_BYTES: Final = 1 << 34
SESSION_BYTES: Final = 16
CHECKSUM_BYTES: Final = 1 << 20

# magic, checksum, kind, flags, meta, payload, entry, number, sync, session, epoch, chain, zero
_HEADER = struct.Struct("<4sIHHIQQQQ16sQII")
# magic, checksum, format, segment, epoch, chain, zero, first number, first sync, epoch and number before
_HEAD = struct.Struct("<4sIIIQIIQQQQ")
_CHECKED_FROM = 8
_LAST = 1

Bytes: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]


class Kind(enum.IntEnum):
    """The subject of a record."""

    CHUNK = 2
    COMMIT = 3
    LOAD = 4
    HOLD = 5


class Record(NamedTuple):
    """A record as it is given to the log.

    Attributes:
        kind: the subject: BEGIN opens a step, LOAD a load, END deletes a session, APPLIED is a part of an overlapped
            step.
        session: the session's id, 16 bytes.
        entry: the number of the step, load or hold that the record belongs to.
        meta: a small message.
        payload: the bytes that go with the message.
    """

    kind: Kind
    session: bytes
    entry: int
    meta: bytes = b""
    payload: Bytes = b""


class LogPosition(NamedTuple):
    """A place in the log, behind a record.

    Attributes:
        epoch: the epoch that wrote the record; 0 before the first.
        number: the number of the record in its epoch; 0 before the first.
    """

    epoch: int
    number: int


class Header(NamedTuple):
    """The header of a record.

    Attributes:
        kind, session, entry: as in `Record`.
        meta_bytes, payload_bytes: the lengths.
        number: the number of the record in its epoch, from 1.
        sync: the number of the sync that the record waits for, from 1.
        last: the record is the last before its sync.
        epoch: the epoch that wrote the record.
        chain: the checksum of everything up to this record's end.
    """

    kind: Kind
    session: bytes
    entry: int
    meta_bytes: int
    payload_bytes: int
    number: int
    sync: int
    last: bool
    epoch: int
    chain: int

    @property
    def nbytes(self) -> int:
        """The bytes of the record on disk."""
        return record_bytes(self.meta_bytes, self.payload_bytes)

    def end(self, offset: int) -> int:
        """Return the place of the record that follows one at an offset."""
        return rounded_up(offset + self.nbytes, BLOCK_BYTES if self.last else UNIT_BYTES)


class SegmentHead(NamedTuple):
    """The head of a segment.

    Attributes:
        epoch: the epoch that wrote the segment.
        segment: the number of the segment in its epoch, from 0.
        chain: the chain at the end of the segment before; 0 in the first.
        number: the number of the segment's first record.
        sync: the number of the sync that this record waits for.
        after: the last record of older epochs that the owner of this epoch has read.
        format: the version of the format.
    """

    epoch: int
    segment: int
    chain: int
    number: int
    sync: int
    after: LogPosition
    format: int = FORMAT


def rounded_up(nbytes: int, unit: int) -> int:
    """Return the next multiple of a unit."""
    return -(-nbytes // unit) * unit


def record_bytes(meta_bytes: int, payload_bytes: int) -> int:
    """Return the bytes of a record on disk, padding included."""
    return rounded_up(HEADER_BYTES + meta_bytes + payload_bytes, UNIT_BYTES)


def as_array(data: Bytes) -> npt.NDArray[np.uint8]:
    """Return bytes as an array, without a copy."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(data, np.uint8) if memoryview(data).nbytes else np.empty(0, np.uint8)


def chained(chain: int, data: Bytes) -> int:
    """Continue a CRC32C over bytes, in parts that leave other threads their turn."""
    array = as_array(data)
    for start in range(0, array.size, CHECKSUM_BYTES):
        chain = google_crc32c.extend(chain, array[start : start + CHECKSUM_BYTES])
    return chain


def require_writable(record: Record) -> None:
    """Refuse a record that no reader would believe.

    Raises:
        ValueError: the message or the payload is too large, or the session's id has not 16 bytes.
    """
    sizes = len(record.meta), as_array(record.payload).size, len(record.session)
    if sizes[0] > MOST_META_BYTES or sizes[1] > MOST_PAYLOAD_BYTES or sizes[2] != SESSION_BYTES:
        raise ValueError(
            f"a record has {sizes[0]} bytes of message, {sizes[1]} of payload and {sizes[2]} of session id; it may "
            f"have at most {MOST_META_BYTES}, at most {MOST_PAYLOAD_BYTES}, and {SESSION_BYTES}"
        )


def encode_header(out: memoryview, header: Header) -> None:
    """Write the header of a record into the first 80 bytes of `out`."""
    packed = bytearray(HEADER_BYTES)
    lengths = (header.meta_bytes, header.payload_bytes)
    numbers = (header.entry, header.number, header.sync)
    flags = _LAST if header.last else 0
    _HEADER.pack_into(
        packed, 0, RECORD_MAGIC, 0, header.kind, flags, *lengths, *numbers, header.session, header.epoch,
        header.chain, 0,
    )  # fmt: skip
    _put_checksum(packed)
    out[:HEADER_BYTES] = packed


def decode_header(data: Bytes) -> Header | None:
    """Read the header of a record; None for anything else than a good one."""
    raw = bytes(data[:HEADER_BYTES])
    if len(raw) < HEADER_BYTES or raw[:4] != RECORD_MAGIC or not _checksum_fits(raw):
        return None
    _, _, kind, flags, meta, payload, entry, number, sync, session, epoch, chain, zero = _HEADER.unpack(raw)
    if meta > MOST_META_BYTES or payload > MOST_PAYLOAD_BYTES or flags & ~_LAST or zero:
        return None
    if kind not in Kind.__members__.values():
        return None
    return Header(Kind(kind), session, entry, meta, payload, number, sync, bool(flags & _LAST), epoch, chain)


def encode_head(head: SegmentHead) -> bytes:
    """Return the head of a segment, 512 bytes."""
    packed = bytearray(HEAD_BYTES)
    _HEAD.pack_into(
        packed, 0, SEGMENT_MAGIC, 0, head.format, head.segment, head.epoch, head.chain, 0, head.number, head.sync,
        *head.after,
    )  # fmt: skip
    _put_checksum(packed)
    return bytes(packed)


def decode_head(data: bytes) -> SegmentHead | None:
    """Read the head of a segment; None for anything else than a good one. The format may be another."""
    raw = data[:HEAD_BYTES]
    if len(raw) < HEAD_BYTES or raw[:4] != SEGMENT_MAGIC or not _checksum_fits(raw):
        return None
    _, _, version, segment, epoch, chain, _, number, sync, *after = _HEAD.unpack_from(raw)
    return SegmentHead(epoch, segment, chain, number, sync, LogPosition(*after), version)


def _put_checksum(packed: bytearray) -> None:
    struct.pack_into("<I", packed, 4, google_crc32c.value(bytes(packed[_CHECKED_FROM:])))


def _checksum_fits(raw: bytes) -> bool:
    return bool(struct.unpack_from("<I", raw, 4)[0] == google_crc32c.value(raw[_CHECKED_FROM:]))
