"""The log as one session sees it: begin an entry, add its chunks, commit it, wait until it is durable."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import numpy as np

from stepwire.errors import FencedError, Reason
from stepwire_server.durability.entries import Attempt, HoldEntry, LoadEntry, StepEntry, encode_entry
from stepwire_server.durability.records import Kind, LogPosition, Record
from stepwire_server.engines.protocol import HostArray

__all__ = ["CHUNK", "EntryLog", "RecordWriter", "SessionLog", "logged_rows"]

CHUNK: Final = struct.Struct("<QQI")
"""Offset and count of a chunk, in elements, and the slot index of a load, or the number of rows of a step's chunk."""

# A smaller chunk waits for the commit, so that a small step is one record.
_INLINE_BYTES: Final = 32 << 10
_MOST_INLINE: Final = 1024


class RecordWriter(Protocol):
    """The place of a session's records: a log on the disk, `LogWriter`, or the memory of a standby."""

    @property
    def written_bytes(self) -> int:
        """The bytes of the records so far."""
        ...

    @property
    def position(self) -> LogPosition:
        """The place behind the last record that was appended."""
        ...

    @property
    def durable_position(self) -> LogPosition:
        """The place behind the last record that survives a loss of the server."""
        ...

    def check(self) -> None:
        """See `LogWriter.check`."""
        ...

    def append(self, record: Record, *, durable: bool = False, awaited: bool = False) -> int:
        """See `LogWriter.append`."""
        ...

    def wait(self, number: int) -> None:
        """See `LogWriter.wait`."""
        ...

    def keeps(self, number: int) -> bool:
        """Tell whether a record that was waited for survives a loss of the server."""
        ...

    def drop(self, session: bytes, entry: int) -> None:
        """Note that the chunks of an entry belong to no commit."""
        ...


class EntryLog:
    """One step or load on its way into the log. Nothing of it counts before its commit.

    Attributes:
        entry: its number.
        applied: the chunks that an overlapped step has applied.
        first: the number of its first record, or a smaller one; 0 without records.
        committed: its commit was appended.
    """

    def __init__(self, log: SessionLog, entry: int, *, at_once: bool) -> None:
        """Await the chunks of an entry; `at_once` writes small ones too as they come."""
        self.entry = entry
        self._log = log
        self._inline_bytes = 0 if at_once else _INLINE_BYTES
        self._inline: list[tuple[int, int]] = []
        self._payloads: list[HostArray] = []
        self.applied = self.first = self._chunks = 0
        self.committed = False

    def chunk(self, offset: int, count: int, payload: HostArray, slot: int = 0) -> None:
        """Write a chunk while the rest arrives: `payload` is its bytes, `(n,) uint8`, which never change."""
        if payload.nbytes < self._inline_bytes and len(self._inline) < _MOST_INLINE:
            self._inline.append((offset, count))
            self._payloads.append(payload)
            return
        if not self.first:
            self.first = self._log.position + 1  # before the record is there: the log lets go of none behind it
            self._log.opened(self)
        self._log.append(Kind.CHUNK, self.entry, CHUNK.pack(offset, count, slot), payload)
        self._chunks += 1

    def rows(self, offset: int, count: int, rows: HostArray, payload: HostArray) -> None:
        """Write a chunk of rows, `(k,) uint64`, as `chunk` does, always at once; see `logged_rows`."""
        if not self.first:
            self.first = self._log.position + 1
            self._log.opened(self)
        whole = np.concatenate([np.ascontiguousarray(rows).view(np.uint8), payload])
        self._log.append(Kind.CHUNK, self.entry, CHUNK.pack(offset, count, len(rows)), whole)
        self._chunks += 1

    @property
    def attempt(self) -> Attempt:
        """All chunks so far that have records of their own."""
        return Attempt(self.entry, self._chunks)

    @property
    def inline(self) -> tuple[tuple[int, int], ...]:
        """Offset and count of the chunks that wait for the commit."""
        return tuple(self._inline)

    def commit(self, entry: StepEntry | LoadEntry) -> int:
        """Append the record that makes the entry count, and return its number to wait for."""
        payload = self._payloads[0] if len(self._payloads) == 1 else np.concatenate([_NONE, *self._payloads])
        kind, self.committed = Kind.COMMIT if isinstance(entry, StepEntry) else Kind.LOAD, True
        return self._log.append(kind, self.entry, encode_entry(entry), payload, durable=True)

    def close(self) -> None:
        """Note that the entry was committed, or never will be. Closing twice is harmless."""
        self._log.closed(self)


def logged_rows(payload: HostArray, count: int) -> tuple[HostArray, HostArray]:
    """Return the rows of a chunk, `(count,) uint64`, and its bytes, from the payload of its record."""
    return payload[: 8 * count].copy().view(np.uint64), payload[8 * count :]


class SessionLog:
    """The log of one session. Thread-safe."""

    def __init__(
        self, writer: RecordWriter, session_id: str, entries: Iterator[int], is_owner: Callable[[], bool]
    ) -> None:
        """Write the records of a session.

        Args:
            writer: the log.
            session_id: the session's id.
            entries: numbers the entries of the whole log.
            is_owner: the look for a newer owner, True if there is none.
        """
        self._writer = writer
        self._session = bytes.fromhex(session_id)
        self._entries = entries
        self._is_owner = is_owner
        self._open: set[EntryLog] = set()
        self._lock = threading.Lock()  # of the set

    @property
    def position(self) -> int:
        """The number of the log's last record."""
        return self._writer.position.number

    @property
    def nbytes(self) -> int:
        """The bytes of the whole log so far."""
        return self._writer.written_bytes

    def check(self) -> None:
        """Refuse when nothing can become durable any more.

        Raises:
            DataLossError: DURABILITY_FAILED.
            FencedError: NOT_PRIMARY.
        """
        self._writer.check()

    def begin(self, *, at_once: bool = False) -> EntryLog:
        """Begin an entry. Its chunks are written as they come, small ones too with `at_once`."""
        return EntryLog(self, next(self._entries), at_once=at_once)

    def opened(self, entry: EntryLog) -> None:
        """Note an entry that has records of its own."""
        with self._lock:
            self._open.add(entry)

    def closed(self, entry: EntryLog) -> None:
        """Forget an entry that is over; a half-applied step needs its chunks yet."""
        with self._lock:
            was_open = entry in self._open
            self._open.discard(entry)
        if was_open and not (entry.committed or entry.applied):
            self._writer.drop(self._session, entry.entry)

    def first_open(self) -> int | None:
        """Return the number of the first record of all entries that are not over; None without one."""
        with self._lock:
            return min((entry.first for entry in self._open), default=None)

    def hold(self, entry: HoldEntry) -> int:
        """Append what has become of a worker without a step, and return the record's number."""
        return self.append(Kind.HOLD, next(self._entries), encode_entry(entry), durable=True)

    def append(
        self, kind: Kind, entry: int, meta: bytes, payload: HostArray | None = None, *, durable: bool = False
    ) -> int:
        """Append a record, and return its number; after a durable one the caller calls `wait`."""
        record = Record(kind, self._session, entry, meta, _NONE if payload is None else payload)
        return self._writer.append(record, durable=durable, awaited=durable)

    def keeps(self, number: int) -> bool:
        """See `RecordWriter.keeps`."""
        return self._writer.keeps(number)

    def wait(self, number: int) -> None:
        """Wait until a record and all before it are durable, and this server still owns the directory.

        Raises:
            DataLossError, FencedError: as `check`.
        """
        if number > self._writer.durable_position.number:
            self._writer.wait(number)
            return
        self._writer.check()
        if not self._is_owner():
            raise FencedError(
                "another server owns the data directory now; connect to that one", reason=Reason.NOT_PRIMARY
            )


_NONE: Final = np.empty(0, np.uint8)
