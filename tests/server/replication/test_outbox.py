"""The records that wait for a standby."""

from __future__ import annotations

import threading

import numpy as np

from stepwire_server.replication.outbox import Outbox, Subject
from stepwire_server.replication.records import RecordKind
from stepwire_server.replication.status import ReplicationStatus

CHUNK = Subject(RecordKind.CHUNK, bytes(16), 1)


def test_records_are_kept_until_they_are_acknowledged() -> None:
    outbox = Outbox()
    reader = outbox.connect()
    numbers = [outbox.append(5, CHUNK, payload=np.zeros(8, np.uint8)) for _ in range(3)]
    assert numbers == [1, 2, 3]
    records = outbox.read(reader, 0)
    assert [next(records).number for _ in numbers] == numbers
    outbox.acknowledge(2)
    assert (outbox.has_from(3), outbox.has_from(2), outbox.has_from(4), outbox.has_from(5)) == (
        True,
        False,
        True,
        False,
    )
    other = outbox.connect()
    assert not outbox.disconnect(reader), "another one reads"
    assert next(records, None) is None
    assert next(outbox.read(other, 2)).number == 3, "it goes on where the first one was"


def test_a_reader_that_begins_anew_gets_nothing_from_before() -> None:
    outbox = Outbox()
    outbox.append(5, CHUNK)
    outbox.clear()
    assert (outbox.joined, outbox.acknowledged) == (1, 1)
    outbox.append(5, CHUNK)
    assert next(outbox.read(outbox.connect(), 1)).number == 2


def test_steps_are_counted_until_they_are_acknowledged_and_then() -> None:
    outbox = Outbox()
    outbox.connect()
    for _ in range(2):
        outbox.append(5, CHUNK, payload=np.zeros(8, np.uint8))
        outbox.append(5, Subject(RecordKind.COMMIT, bytes(16), 1), b"meta")

    def counted() -> tuple[int, int, bool]:
        found = outbox.counted(ReplicationStatus(problem="kept"))
        assert (found.position, found.problem) == (4, "kept")
        return found.pending_steps, found.acknowledged_steps, found.pending_bytes > 0

    assert counted() == (2, 0, True)
    outbox.acknowledge(3)
    assert counted() == (1, 1, True)
    outbox.acknowledge(4)
    assert counted() == (0, 2, False)


def test_a_chunk_waits_for_room_as_long_as_somebody_reads() -> None:
    outbox = Outbox(most_bytes=10)
    outbox.append(5, CHUNK, payload=np.zeros(8, np.uint8))
    asked: list[bool] = []
    outbox.wait_for_room(8, lambda: bool(asked.append(True)))
    assert asked == [True], "nobody reads, so nothing is waited for"
    outbox.acknowledge(1)
    outbox.wait_for_room(80, lambda: True)


class Told(threading.Condition):
    """Counts the times that all who wait were woken."""

    told = 0

    def notify_all(self) -> None:
        self.told += 1
        super().notify_all()


def test_a_record_wakes_nobody_who_waits_for_acknowledgements() -> None:
    outbox = Outbox()
    outbox.changed = told = Told(outbox.changed._lock)  # type: ignore[attr-defined]
    records = outbox.read(outbox.connect(), 0)
    before = told.told
    outbox.append(5, CHUNK)
    assert (next(records).number, told.told - before) == (1, 0)
    outbox.acknowledge(1)
    assert told.told - before == 1
