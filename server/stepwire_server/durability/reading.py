"""Reading the log: its records in order, the tail that may be torn, and the damage that may not.

The epochs that count form a chain: each names the last record that its owner has read of older ones. What an older
owner wrote behind that record was never acknowledged, and no later reader sees it.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from stepwire.errors import DataLossError, Reason
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.records import FORMAT, UNIT_BYTES, Header, LogPosition, SegmentHead, chained
from stepwire_server.durability.segments import FIRST_RECORD, SegmentName, SegmentReader, chain_of, segments_of

__all__ = ["Damage", "LogReader", "LogRecord", "PayloadRoom", "find_damage", "read_log"]


class Damage(Exception):
    """A place at which the log lacks records that were acknowledged.

    Attributes:
        segment: the segment with the place.
        offset: the place in it.
        after: the last good record.
    """

    def __init__(self, segment: SegmentName, offset: int, after: LogPosition) -> None:
        """Name the place."""
        super().__init__(str(segment.path), offset)
        self.segment, self.offset, self.after = segment, offset, after


class LogRecord(NamedTuple):
    """A record of the log, and its place. The payload stays on the disk, unless the reader has kept it.

    Attributes:
        header: the header, with the record's kind, session, entry, number and epoch.
        meta: the small message.
        path: the segment.
        offset: the place of the record in the segment.
        chain_before: the chain that the record continues.
        disk: the system calls.
        kept: the payload, as it was checked; None where it is on the disk alone.
    """

    header: Header
    meta: bytes
    path: pathlib.Path
    offset: int
    chain_before: int
    disk: Disk
    kept: npt.NDArray[np.uint8] | None = None

    @property
    def position(self) -> LogPosition:
        """The place behind the record."""
        return LogPosition(self.header.epoch, self.header.number)

    def read_payload(self) -> npt.NDArray[np.uint8]:
        """Return the payload: the one that was kept, or read from the disk and checked again.

        Raises:
            DataLossError: the payload is not as it was, or the disk failed.
        """
        if self.kept is not None:
            return self.kept
        payload = np.empty(self.header.payload_bytes, np.uint8)
        with _told(self.path.parent), SegmentReader(self.disk, self.path) as file:
            count = file.payload_into(self.offset, self.header, payload.data)
        chain = chained(chained(self.chain_before, self.meta), payload)
        if count < payload.size or chain != self.header.chain:
            raise _damaged(self.path, self.offset, LogPosition(self.header.epoch, self.header.number - 1))
        return payload


class PayloadRoom(Protocol):
    """Room for payloads that are kept."""

    def array(self, nbytes: int) -> npt.NDArray[np.uint8] | None:
        """Return an array of some bytes, which has its room as long as it lives; None for no bytes, or no room."""
        ...


class LogReader:
    """Iterates over the records of a log once, in the order in which they were appended."""

    def __init__(
        self, disk: Disk, folder: pathlib.Path, up_to: LogPosition | None = None, *, room: PayloadRoom | None = None
    ) -> None:
        """Read nothing yet; see `read_log`. Payloads are kept where there is a room for them."""
        self._disk, self._folder, self._up_to = disk, folder, up_to
        self._room = room
        self._end = LogPosition(0, 0)
        self._ended = False

    @property
    def end(self) -> LogPosition:
        """The place behind the last record, once the iteration has ended.

        Raises:
            RuntimeError: the iteration has not ended; an owner that began there would lose the rest of the log.
        """
        if not self._ended:
            raise RuntimeError("the log was not read to its end; iterate over all of its records first")
        return self._end

    def __iter__(self) -> Iterator[LogRecord]:
        """Yield the records.

        Raises:
            DataLossError: LOG_DAMAGED, a record that was acknowledged is bad; DURABILITY_FAILED, the disk failed.
        """
        with _told(self._folder):
            yield from self.records()

    def records(self) -> Iterator[LogRecord]:
        """Yield the records.

        Raises:
            Damage: a record that was acknowledged is bad.
            DataLossError: the log has the format of a newer server.
            OSError: the disk failed.
        """
        epochs: dict[int, list[SegmentName]] = {}
        for name in segments_of(self._disk, self._folder):
            epochs.setdefault(name.epoch, []).append(name)
        for names, limit in self._history(epochs):
            walk = _Walk(self._disk, names, limit, self._room)
            yield from walk.records()
            if limit is None:
                self._sync(names)
            self._end = LogPosition(names[0].epoch, walk.number - 1)
        self._ended = True

    def _sync(self, names: list[SegmentName]) -> None:
        """Put on the disk what was read: its owner may have ended before that, and a newer owner builds on it."""
        for name in names:
            with SegmentReader(self._disk, name.path) as file:
                file.sync()
        self._disk.sync_folder(self._folder)

    def _history(self, epochs: dict[int, list[SegmentName]]) -> list[tuple[list[SegmentName], int | None]]:
        """Return the epochs that count, oldest first, each with the last record that the next one has read."""
        history: list[tuple[list[SegmentName], int | None]] = []
        for epoch in sorted(epochs, reverse=True):
            after = self._after(epochs[epoch])
            if after is not None:
                limited = self._up_to is not None and self._up_to.epoch == epoch
                history.append((epochs[epoch], self._up_to.number if self._up_to and limited else None))
                break
        else:
            return []
        while (names := epochs.get(after.epoch)) is not None:
            history.append((names, after.number))
            before = self._after(names)
            if before is None:
                raise Damage(names[0], 0, LogPosition(0, 0))
            after = before
        return history[::-1]

    def _after(self, names: list[SegmentName]) -> LogPosition | None:
        """Return the place at which an epoch continues the log; None for one that has not begun.

        The head of a segment is on the disk before its records are: a bad head with records behind it is damage.
        """
        for name in names:
            if (head := _head_of(self._disk, name)) is not None:
                return head.after
        for name in names:
            if _first_proof(self._disk, name, FIRST_RECORD, 0) and _head_of(self._disk, name) is None:
                raise Damage(names[0], 0, LogPosition(0, 0))
        return None


class _Walk:
    """Reads one epoch.

    Attributes:
        number: the number of the next record.
    """

    def __init__(self, disk: Disk, names: list[SegmentName], limit: int | None, room: PayloadRoom | None) -> None:
        self.number = 1
        self._disk, self._names, self._limit, self._room = disk, names, limit, room
        self._sync, self._chain, self._offset = 1, 0, 0

    def records(self) -> Iterator[LogRecord]:
        """Yield the records up to the limit.

        Raises:
            Damage: a record that was acknowledged is bad.
        """
        at = 0
        for at, name in enumerate(self._names):
            if not self._enter(at):
                at -= at > 0
                break
            yield from self._segment(name)
            if self._limit is not None and self.number > self._limit:
                return
        if self._limit is not None:  # the next owner had read more
            if self.number <= self._limit:
                raise self._damage(at)
        elif self._acknowledged(at):
            raise self._damage(at)

    def _enter(self, at: int) -> bool:
        """Begin a segment; False if it does not continue the one before."""
        name = self._names[at]
        head = _head_of(self._disk, name)
        if head is None or (head.epoch, head.segment) != (name.epoch, name.segment):
            return False
        if at == 0 and name.segment > 0:  # older segments are no longer kept
            self.number, self._sync, self._chain = head.number, head.sync, head.chain
        follows = at == 0 or self._names[at - 1].segment + 1 == name.segment
        if not follows or (head.number, head.sync, head.chain) != (self.number, self._sync, self._chain):
            return False
        self._chain, self._offset = chain_of(head), FIRST_RECORD
        return True

    def _segment(self, name: SegmentName) -> Iterator[LogRecord]:
        with SegmentReader(self._disk, name.path) as file:
            while self._limit is None or self.number <= self._limit:
                record = self._read(file, name)
                if record is None:
                    return
                yield record

    def _read(self, file: SegmentReader, name: SegmentName) -> LogRecord | None:
        """Read the next record of a segment; None for a bad one."""
        header = file.header(self._offset)
        if header is None or (header.epoch, header.number, header.sync) != (name.epoch, self.number, self._sync):
            return None
        meta = file.meta(self._offset, header)
        kept = None if self._room is None else self._room.array(header.payload_bytes)
        chain = chained(self._chain, meta)
        if kept is None:
            chain = file.chain(self._offset, header, chain)
        else:
            chain = chained(chain, kept[: file.payload_into(self._offset, header, kept.data)])
        if chain != header.chain:
            return None
        record = LogRecord(header, meta, name.path, self._offset, self._chain, self._disk, kept)
        self.number, self._chain = header.number + 1, header.chain
        self._offset = header.end(self._offset)
        self._sync += header.last
        return record

    def _acknowledged(self, at: int) -> bool:
        """Tell whether a record behind the present place proves that the one here was acknowledged."""
        offset = self._offset
        if offset:
            with SegmentReader(self._disk, self._names[at].path) as file:
                bad = file.header(offset)
            if bad is not None and bad.number == self.number:
                offset += bad.nbytes
        for name in self._names[at:]:
            if _first_proof(self._disk, name, max(offset, FIRST_RECORD), self._sync):
                return True
            headless = _first_proof(self._disk, name, FIRST_RECORD, 0) and _head_of(self._disk, name) is None
            if headless:  # heads are on the disk before the first record is written
                return True
            offset = 0
        return False

    def _damage(self, at: int) -> Damage:
        return Damage(self._names[at], self._offset, LogPosition(self._names[at].epoch, self.number - 1))


def read_log(disk: Disk, folder: pathlib.Path, up_to: LogPosition | None = None) -> LogReader:
    """Return the records of the log in a folder, to be iterated over once.

    Args:
        disk: the system calls.
        folder: the folder.
        up_to: the end to read to in the newest epoch, behind which its owner is writing; None for the log's end.
    """
    return LogReader(disk, folder, up_to)


def find_damage(disk: Disk, folder: pathlib.Path) -> Damage | None:
    """Read the whole log, and return its first damage.

    Raises:
        OSError: the disk failed.
        DataLossError: the log has the format of a newer server.
    """
    try:
        for _ in LogReader(disk, folder).records():
            pass
    except Damage as damage:
        return damage
    return None


def _head_of(disk: Disk, name: SegmentName) -> SegmentHead | None:
    with SegmentReader(disk, name.path) as file:
        head = file.head()
    if head is not None and head.format != FORMAT:
        raise DataLossError(
            f"{name.path} has format {head.format} and this server reads format {FORMAT}; start the newer server that "
            "wrote the log",
            reason=Reason.LOG_DAMAGED,
            metadata={"path": name.path},
        )
    return head


def _first_proof(disk: Disk, name: SegmentName, offset: int, sync: int) -> bool:
    """Tell whether a segment has a record that waits for a later sync than a given one."""
    with SegmentReader(disk, name.path) as file:
        found = file.headers(offset // UNIT_BYTES * UNIT_BYTES)
        return any(header.epoch == name.epoch and header.sync > sync for _, header in found)


@contextlib.contextmanager
def _told(folder: pathlib.Path) -> Iterator[None]:
    """Tell damage and the failures of a disk as what a server's caller may see."""
    try:
        yield
    except Damage as damage:
        raise _damaged(damage.segment.path, damage.offset, damage.after) from damage
    except OSError as error:
        raise DataLossError(
            f"the log in {folder} could not be read: {error}; an I/O error is no damage of the log: mend the disk, "
            "and start the server again",
            reason=Reason.DURABILITY_FAILED,
            metadata={"path": error.filename or folder},
        ) from error


def _damaged(path: pathlib.Path, offset: int, after: LogPosition) -> DataLossError:
    return DataLossError(
        f"{path} is damaged at byte {offset}, behind record {after.number} of epoch {after.epoch}: records that were "
        "acknowledged are lost; restore the data directory from a copy, or cut the log there by `stepwire checkpoint "
        f"repair --data-dir {path.parent.parent}`",
        reason=Reason.LOG_DAMAGED,
        metadata={"path": path, "offset": offset},
    )
