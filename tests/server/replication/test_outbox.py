"""The records that wait for a standby."""

from __future__ import annotations

import numpy as np

from stepwire_server.replication.outbox import Outbox, Subject
from stepwire_server.replication.records import RecordKind

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


def test_a_chunk_waits_for_room_as_long_as_somebody_reads() -> None:
    outbox = Outbox(most_bytes=10)
    outbox.append(5, CHUNK, payload=np.zeros(8, np.uint8))
    asked: list[bool] = []
    outbox.wait_for_room(8, lambda: bool(asked.append(True)))
    assert asked == [True], "nobody reads, so nothing is waited for"
    outbox.acknowledge(1)
    outbox.wait_for_room(80, lambda: True)
