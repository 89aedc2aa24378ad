"""The records of a primary that its standby has not acknowledged, in their order.

Payloads are those that clients sent, kept and not copied. The outbox is of memory alone, so it has a bound: a chunk
waits while too many bytes wait. A commit never waits: it is called under the lock of its session.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np

from stepwire_server.engines.protocol import HostArray
from stepwire_server.replication.records import RecordKind, ReplicationRecord
from stepwire_server.replication.status import ReplicationStatus

__all__ = ["NOTHING", "Outbox", "Subject"]

NOTHING: Final = np.empty(0, np.uint8)
_MOST_BYTES: Final = 256 << 20


class Subject(NamedTuple):
    """The subject of a record: its kind, the session's id, and the number of its entry."""

    kind: RecordKind
    session: bytes = b""
    entry: int = 0


class Outbox:
    """Numbers records and keeps them until they are acknowledged. Thread-safe.

    Attributes:
        changed: notified of every change but a new record; its lock is that of the primary's state too.
        position: the number of the last record.
        acknowledged: the number of the last one that the standby has.
        joined: the number of the last record before the present standby came: it never gets those.
        written_bytes: the bytes of all records so far.
        acknowledged_steps: the commits that a standby has acknowledged so far.
        reader: the stream that sends the records; 0 for none.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        """Begin without records; `most_bytes` of them may wait."""
        lock = threading.RLock()
        self.changed, self._to_read = threading.Condition(lock), threading.Condition(lock)
        self.position = self.acknowledged = self.joined = self.written_bytes = self.reader = 0
        self.acknowledged_steps = 0
        self._most_bytes, self._bytes, self._readers = most_bytes, 0, 0
        self._records: deque[ReplicationRecord] = deque()

    @property
    def connected(self) -> bool:
        """A standby reads."""
        return self.reader > 0

    @property
    def is_full(self) -> bool:
        """More bytes wait than may."""
        return self._bytes > self._most_bytes

    def append(self, epoch: int, subject: Subject, meta: bytes = b"", payload: HostArray = NOTHING) -> int:
        """Number a record, and keep it where a standby is or may come back. Return its number."""
        with self.changed:
            self.position += 1
            self.written_bytes += len(meta) + payload.nbytes
            kind, session, entry = subject
            record = ReplicationRecord(self.position, epoch, kind, session, entry, meta, payload)
            self._records.append(record)
            self._bytes += record.nbytes
            self._to_read.notify_all()  # the stream alone: sessions that wait for acknowledgements sleep on
            return self.position

    def wait_for_room(self, nbytes: int, go_on: Callable[[], bool]) -> None:
        """Wait while too many bytes wait to be acknowledged, as long as `go_on` says so. No lock may be held."""
        with self.changed:
            self.changed.wait_for(lambda: not self._bytes or self._bytes + nbytes <= self._most_bytes or not go_on())

    def acknowledge(self, number: int) -> None:
        """Let go of the records up to a number."""
        with self.changed:
            self.acknowledged = max(self.acknowledged, min(number, self.position))
            while self._records and self._records[0].number <= self.acknowledged:
                record = self._records.popleft()
                self._bytes -= record.nbytes
                self.acknowledged_steps += record.kind is RecordKind.COMMIT
            self.changed.notify_all()

    def counted(self, status: ReplicationStatus) -> ReplicationStatus:
        """Return how replication stands, with the counts of the records here."""
        with self.changed:
            return status._replace(
                position=self.position,
                acknowledged=self.acknowledged,
                pending_steps=sum(record.kind is RecordKind.COMMIT for record in self._records),
                pending_bytes=self._bytes,
                acknowledged_steps=self.acknowledged_steps,
            )

    def has_from(self, number: int) -> bool:
        """Tell whether all records from a number on are there."""
        with self.changed:
            first = self._records[0].number if self._records else self.position + 1
            return first <= number <= self.position + 1

    def clear(self) -> None:
        """Let go of all records: nobody reads them, or their reader begins anew."""
        with self.changed:
            self._records.clear()
            self._bytes = 0
            self.acknowledged = self.joined = self.position
            self._notify_all()

    def connect(self) -> int:
        """Have a stream read from now on, in the place of any other; return its number."""
        with self.changed:
            self._readers += 1
            self.reader = self._readers
            self._notify_all()
            return self.reader

    def disconnect(self, reader: int) -> bool:
        """End the reading of a stream; return False if another one has come since."""
        with self.changed:
            was_present = self.reader == reader
            if was_present:
                self.reader = 0
            self._notify_all()
            return was_present

    def read(self, reader: int, after: int) -> Iterator[ReplicationRecord]:
        """Yield the records behind a number as they come, until the stream is disconnected."""
        while (record := self._next(reader, after)) is not None:
            after = record.number
            yield record

    def _next(self, reader: int, after: int) -> ReplicationRecord | None:
        with self._to_read:
            self._to_read.wait_for(
                lambda: self.reader != reader or (self._records and self._records[-1].number > after)
            )
            if self.reader != reader:
                return None
            first = self._records[0].number
            return self._records[max(after + 1, first) - first]

    def _notify_all(self) -> None:
        self.changed.notify_all()
        self._to_read.notify_all()
