"""Reading ahead: the same records, within the room; a reader that waits for room never keeps its caller waiting."""

from __future__ import annotations

import threading

import pytest

from stepwire.errors import DataLossError, Reason
from stepwire_server.durability.read_ahead import ReadAhead
from stepwire_server.durability.reading import LogRecord
from stepwire_server.durability.records import Kind, Record
from tests.server.durability.logs import FOLDER, START, write_epoch
from tests.server.durability.memory_disk import MemoryDisk

EACH = 600


def log_of(count: int) -> MemoryDisk:
    """Return a log of records of 600 bytes, each with a sync of its own."""
    disk = MemoryDisk()
    records = [Record(Kind.CHUNK, bytes(16), entry, b"m", bytes([entry % 256]) * EACH) for entry in range(count)]
    write_epoch(disk, 1, START, [[record] for record in records], acknowledged=[])
    return disk


def payloads(records: list[LogRecord]) -> list[bytes]:
    return [record.read_payload().tobytes() for record in records]


def expected(count: int) -> list[bytes]:
    return [bytes([entry % 256]) * EACH for entry in range(count)]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stepwire-log-reader"]


def test_payloads_that_have_room_are_read_once() -> None:
    disk = log_of(5)
    records = list(ReadAhead(disk, FOLDER, keep_bytes=5 * EACH))
    disk.files.clear()
    assert payloads(records) == expected(5)
    assert readers() == []


def test_a_caller_that_keeps_everything_gets_what_has_no_room_from_the_disk() -> None:
    records = list(ReadAhead(log_of(5), FOLDER, keep_bytes=3 * EACH))
    assert [record.kept is not None for record in records] == [True, True, True, False, False]
    assert payloads(records) == expected(5)


def test_payloads_larger_than_the_room_are_not_waited_for() -> None:
    records = list(ReadAhead(log_of(3), FOLDER, keep_bytes=EACH - 1))
    assert [record.kept for record in records] == [None] * 3
    assert payloads(records) == expected(3)


def test_room_is_given_back_with_each_record() -> None:
    reader, found = ReadAhead(log_of(2000), FOLDER, keep_bytes=2 * EACH), list[bytes]()
    for record in reader:
        found.append(record.read_payload().tobytes())
    assert found == expected(2000)
    assert reader.end == (1, 2000)


def test_a_caller_that_ends_early_ends_the_thread() -> None:
    for keep_bytes in (2 * EACH, 10_000 * EACH):  # the thread waits for room, or for fewer records
        reader = ReadAhead(log_of(1500), FOLDER, keep_bytes=keep_bytes)
        records = iter(reader)
        assert next(records).header.entry == 0
        records.close()  # type: ignore[attr-defined]
        assert readers() == []
        with pytest.raises(RuntimeError, match="not read to its end"):
            _ = reader.end


def test_damage_is_told_behind_the_last_good_record() -> None:
    disk, found = log_of(4), list[int]()
    place = list(ReadAhead(disk, FOLDER))[2]
    disk.files[place.path].content[place.offset + 300] ^= 1
    with pytest.raises(DataLossError) as failed:
        found.extend(record.header.entry for record in ReadAhead(disk, FOLDER))
    assert found == [0, 1]
    assert failed.value.reason is Reason.LOG_DAMAGED
