"""The files of the log. No other module opens one."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from stepwire_server.durability.disk import Disk, read_all, write_all
from stepwire_server.durability.records import (
    BLOCK_BYTES,
    HEAD_BYTES,
    HEADER_BYTES,
    RECORD_MAGIC,
    UNIT_BYTES,
    Bytes,
    Header,
    LogPosition,
    Record,
    SegmentHead,
    as_array,
    chained,
    decode_head,
    decode_header,
    encode_head,
    encode_header,
    record_bytes,
    rounded_up,
)

__all__ = ["SEGMENT_BYTES", "SegmentName", "SegmentReader", "SegmentWriter", "chain_of", "segments_of"]

SEGMENT_BYTES: Final = 64 << 20
FIRST_RECORD: Final = BLOCK_BYTES  # the head has a block of its own
BUFFER_BYTES: Final = 4 << 20
_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{8})\.log")


class SegmentName(NamedTuple):
    """The name of a segment. Names sort in the order of the log.

    Attributes:
        epoch: the epoch that wrote the segment.
        segment: the number of the segment in its epoch.
        path: the file.
    """

    epoch: int
    segment: int
    path: pathlib.Path

    @classmethod
    def of(cls, folder: pathlib.Path, epoch: int, segment: int) -> SegmentName:
        """Name a segment of a folder."""
        return cls(epoch, segment, folder / f"{epoch:016x}-{segment:08x}.log")


def segments_of(disk: Disk, folder: pathlib.Path) -> list[SegmentName]:
    """List the segments of a folder in the order of the log. Other names are left alone.

    Raises:
        OSError: the disk failed.
    """
    found = (_NAME.fullmatch(name) for name in disk.names(folder))
    return sorted(SegmentName.of(folder, int(name[1], 16), int(name[2], 16)) for name in found if name)


def chain_of(head: SegmentHead) -> int:
    """Return the value that the chain of a segment starts at: the checksum in its head."""
    return int.from_bytes(encode_head(head)[4:8], "little")


class SegmentWriter:
    """Writes records into segments. One thread's; after an OSError nothing more may be asked but `close`.

    All bytes go through one buffer, whose place in the file and length are multiples of 4096 bytes.

    Attributes:
        epoch: the epoch that writes.
        number: the number of the last record.
        sync_number: the number of the sync that the next record waits for.
        chain: the chain behind the last record.
        segments: the segments created.
        written_bytes: the bytes of the records.
        direct: the file system accepts O_DIRECT.
    """

    def __init__(
        self,
        disk: Disk,
        folder: pathlib.Path,
        epoch: int,
        *,
        after: LogPosition,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """Create the first segment of an epoch.

        Args:
            disk: the system calls.
            folder: the folder of the log, which exists.
            epoch: the owner's epoch.
            after: the last record of older epochs that the owner has read.
            segment_bytes: the bytes of a segment; a larger record has a larger one.

        Raises:
            OSError: the disk failed.
        """
        self.epoch, self.number, self.sync_number, self.chain = epoch, 0, 1, 0
        self.segments, self.written_bytes, self.direct = 0, 0, True
        self._disk, self._folder, self._after = disk, folder, after
        self._segment_bytes = rounded_up(max(segment_bytes, 2 * BLOCK_BYTES), BLOCK_BYTES)
        self._memory = mmap.mmap(-1, BUFFER_BYTES)  # begins at a page
        self._view = memoryview(self._memory)
        self._array = np.frombuffer(self._memory, np.uint8)
        self._descriptor: int | None = None
        self._start = self._filled = self._size = 0
        self._unsynced = self._flagged = False
        self._create(0)

    def append(self, record: Record, *, last: bool = False) -> int:
        """Add a record, and return its number.

        Args:
            record: the record.
            last: the caller calls `sync` next.

        Raises:
            OSError: the disk failed.
        """
        meta, payload = as_array(record.meta), as_array(record.payload)
        nbytes = record_bytes(meta.size, payload.size)
        if self._start + self._filled + nbytes > self._size:
            self._roll(nbytes)
        chain = chained(chained(self.chain, meta), payload)
        header = Header(
            record.kind, record.session, record.entry, meta.size, payload.size, self.number + 1, self.sync_number,
            last, self.epoch, chain,
        )  # fmt: skip
        raw = bytearray(HEADER_BYTES)
        encode_header(memoryview(raw), header)
        for part in (raw, meta, payload, bytes(nbytes - HEADER_BYTES - meta.size - payload.size)):
            self._put(part)
        self.number, self.chain, self._flagged = header.number, chain, last
        self.written_bytes += nbytes
        return header.number

    def flush(self) -> None:
        """Hand the records so far to the system, without waiting for the disk.

        The last block may be written again with what follows: nobody was told of its records yet.

        Raises:
            OSError: the disk failed.
        """
        self._write(rounded_up(self._filled, BLOCK_BYTES))
        whole = self._filled // BLOCK_BYTES * BLOCK_BYTES
        rest = self._filled - whole
        self._array[:rest] = self._array[whole : self._filled].copy()
        self._start, self._filled = self._start + whole, rest

    def sync(self) -> None:
        """Wait until the records so far are on the disk. What follows begins in a block of its own.

        Raises:
            OSError: the disk failed.
        """
        self._settle()
        self.sync_number += self._flagged
        self._flagged = False

    def close(self) -> None:
        """Close the file. Records that were not synced may be lost.

        Raises:
            OSError: the disk failed.
        """
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            self._disk.close(descriptor)

    def _settle(self) -> None:
        nbytes = rounded_up(self._filled, BLOCK_BYTES)
        self._write(nbytes)
        self._start, self._filled = self._start + nbytes, 0
        if self._unsynced:
            self._disk.sync(self._open())
            self._unsynced = False

    def _put(self, part: Bytes) -> None:
        data = as_array(part)
        while data.size:
            count = min(data.size, BUFFER_BYTES - self._filled)
            self._array[self._filled : self._filled + count] = data[:count]
            data, self._filled = data[count:], self._filled + count
            if self._filled == BUFFER_BYTES:
                self._write(BUFFER_BYTES)
                self._start, self._filled = self._start + BUFFER_BYTES, 0

    def _write(self, nbytes: int) -> None:
        """Write the buffer up to a multiple of the block, with zeros behind what is filled."""
        if nbytes:
            self._array[self._filled : nbytes] = 0
            write_all(self._disk, self._open(), self._view[:nbytes], self._start)
            self._unsynced = True

    def _roll(self, nbytes: int) -> None:
        """Start a new segment that holds a record of so many bytes; the present one is on the disk before."""
        self._settle()
        self.close()
        self._create(nbytes)

    def _create(self, nbytes: int) -> None:
        name = SegmentName.of(self._folder, self.epoch, self.segments)
        head = SegmentHead(self.epoch, self.segments, self.chain, self.number + 1, self.sync_number, self._after)
        size = max(self._segment_bytes, rounded_up(FIRST_RECORD + nbytes, BLOCK_BYTES))
        plain = self._disk.open(name.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with contextlib.ExitStack() as failed:
            failed.callback(self._disk.close, plain)
            self._disk.allocate(plain, size)
            self._array[:HEAD_BYTES] = np.frombuffer(encode_head(head), np.uint8)
            self._array[HEAD_BYTES:BLOCK_BYTES] = 0
            direct = self._write_head_directly(name.path) if self.direct else None
            if direct is None:
                self.direct = False
                write_all(self._disk, plain, self._view[:BLOCK_BYTES], 0)
            else:
                failed.callback(self._disk.close, direct)
            self._disk.sync(plain if direct is None else direct)
            self._disk.sync_folder(self._folder)
            failed.pop_all()
        if direct is not None:
            self._disk.close(plain)
        self._descriptor = plain if direct is None else direct
        self._start, self._filled, self._size = FIRST_RECORD, 0, size
        self.segments += 1
        self.chain = chain_of(head)

    def _write_head_directly(self, path: pathlib.Path) -> int | None:
        """Return a file that bypasses the page cache, its head written; None if the file system refuses."""
        descriptor = None
        try:
            descriptor = self._disk.open(path, os.O_WRONLY | os.O_DIRECT)
            write_all(self._disk, descriptor, self._view[:BLOCK_BYTES], 0)
        except OSError as error:
            if descriptor is not None:
                self._disk.close(descriptor)
            if error.errno != errno.EINVAL:
                raise
            return None
        return descriptor

    def _open(self) -> int:
        if self._descriptor is None:
            raise OSError(errno.EBADF, "the log is closed")
        return self._descriptor


class SegmentReader:
    """Reads one segment. A context manager; every method raises OSError if the disk fails."""

    def __init__(self, disk: Disk, path: pathlib.Path) -> None:
        """Open a segment."""
        self.path = path
        self._disk = disk
        self._descriptor = disk.open(path, os.O_RDONLY)
        self._size: int | None = None

    def __enter__(self) -> SegmentReader:
        """Hold the file for a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._disk.close(self._descriptor)

    @property
    def nbytes(self) -> int:
        """The bytes of the file."""
        if self._size is None:
            self._size = self._disk.size(self._descriptor)
        return self._size

    def sync(self) -> None:
        """Wait until the content has reached the disk, by whomever it was written."""
        self._disk.sync(self._descriptor)

    def head(self) -> SegmentHead | None:
        """Return the head; None for a bad one."""
        return decode_head(self._read(0, HEAD_BYTES))

    def header(self, offset: int) -> Header | None:
        """Return the header at an offset; None for a bad one, or one whose record would not fit into the file."""
        header = decode_header(self._read(offset, HEADER_BYTES))
        return header if header is not None and offset + header.nbytes <= self.nbytes else None

    def meta(self, offset: int, header: Header) -> bytes:
        """Return the message of the record at an offset."""
        return self._read(offset + HEADER_BYTES, header.meta_bytes)

    def payload_into(self, offset: int, header: Header, out: memoryview) -> int:
        """Read the payload of the record at an offset, and return how many of its bytes the file had."""
        return read_all(self._disk, self._descriptor, out, offset + HEADER_BYTES + header.meta_bytes)

    def chain(self, offset: int, header: Header, chain: int) -> int:
        """Continue a chain over the payload of the record at an offset, in parts."""
        place = offset + HEADER_BYTES + header.meta_bytes
        end = place + header.payload_bytes
        part = np.empty(min(header.payload_bytes, BUFFER_BYTES), np.uint8)
        while place < end:
            count = read_all(self._disk, self._descriptor, part.data[: end - place], place)
            if not count:
                break
            chain, place = chained(chain, part[:count]), place + count
        return chain

    def headers(self, offset: int) -> Iterator[tuple[int, Header]]:
        """Yield all good headers from an offset on, wherever they lie. The record behind each is skipped."""
        part = np.empty(BUFFER_BYTES, np.uint8)
        magic = np.frombuffer(RECORD_MAGIC, np.uint8)
        behind = offset
        while count := read_all(self._disk, self._descriptor, part.data, offset):
            units = part[: count // UNIT_BYTES * UNIT_BYTES].reshape(-1, UNIT_BYTES)
            for unit in np.flatnonzero((units[:, :4] == magic).all(axis=1)):
                header = decode_header(units[unit])
                place = offset + int(unit) * UNIT_BYTES
                if header is not None and place >= behind:
                    behind = place + header.nbytes
                    yield place, header
            offset += BUFFER_BYTES

    def _read(self, offset: int, nbytes: int) -> bytes:
        out = bytearray(nbytes)
        return bytes(out[: read_all(self._disk, self._descriptor, memoryview(out), offset)])
