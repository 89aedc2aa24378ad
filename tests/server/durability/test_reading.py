"""Reading: a right prefix or an error, whatever happens to the bytes; the tail; what a newer owner has not read."""

from __future__ import annotations

import errno
import os
import random
from typing import NamedTuple

import pytest

from stepwire.errors import DataLossError, Reason
from stepwire_server.durability.read_ahead import ReadAhead
from stepwire_server.durability.reading import LogRecord, read_log
from stepwire_server.durability.records import Kind, LogPosition, Record, encode_head
from stepwire_server.durability.repair import cut
from stepwire_server.durability.segments import SegmentReader, segments_of
from tests.server.durability.logs import (
    FOLDER,
    START,
    Read,
    contents,
    random_batches,
    records_of,
    write_epoch,
)
from tests.server.durability.memory_disk import FailAt, File, MemoryDisk

TEARS = int(os.environ.get("STEPWIRE_TEARS", "500"))
TEARS_A_LOG = 25


class Written(NamedTuple):
    """A log as it was written.

    Attributes:
        disk: the disk.
        given: the records in it.
        places: the same records as they lie on the disk.
    """

    disk: MemoryDisk
    given: list[Read]
    places: list[LogRecord]


def written(chance: random.Random) -> Written:
    """Write a log of some epochs, each of which has read the one before."""
    disk, given, after = MemoryDisk(), list[Read](), START
    for epoch in range(1, chance.randint(2, 4)):
        write_epoch(disk, epoch, after, random_batches(chance, 8), acknowledged=given)
        after = contents(disk)[1]
    places = list(read_log(disk, FOLDER))
    assert [place.position for place in places] == [read.position for read in given]
    return Written(disk, given, places)


def copy_of(disk: MemoryDisk) -> MemoryDisk:
    copy = MemoryDisk()
    for path, file in disk.files.items():
        copy.files[path] = File()
        copy.files[path].content = bytearray(file.content)
    return copy


def read_until_damage(disk: MemoryDisk, keep_bytes: int | None = None) -> tuple[list[Read], DataLossError | None]:
    """Return what a reader got, and the error that ended it."""
    found: list[Read] = []
    try:
        reader = read_log(disk, FOLDER) if keep_bytes is None else ReadAhead(disk, FOLDER, keep_bytes=keep_bytes)
        found.extend(records_of(reader))
    except DataLossError as error:
        return found, error
    return found, None


def damage(disk: MemoryDisk, chance: random.Random) -> tuple[str, int, int]:
    """Damage one file; returns the name of the file, and the place and the number of the bytes."""
    path = chance.choice(sorted(disk.files))
    content = disk.files[path].content
    used = len(content.rstrip(b"\0"))
    start = chance.choice((chance.randrange(used), chance.randrange(used) // 512 * 512, chance.randrange(512)))
    way = chance.choice(("flip", "flip", "truncation", "zeros", "noise"))
    if way == "flip":
        content[start] ^= 1 << chance.randrange(8)
        return path.name, start, 1
    extent = {"truncation": len(content), "zeros": 4096, "noise": 700}[way]
    extent = min(extent, len(content) - start)
    if way == "truncation":
        del content[start:]
    else:
        content[start : start + extent] = bytes(extent) if way == "zeros" else chance.randbytes(extent)
    return path.name, start, extent


def sync_of(place: LogRecord) -> tuple[int, int]:
    return place.header.epoch, place.header.sync


def test_whatever_happens_to_the_bytes_no_wrong_record_is_read() -> None:
    log, outcomes = written(random.Random(0)), dict.fromkeys((True, False), 0)
    for seed in range(TEARS):
        chance = random.Random(seed)
        if seed % TEARS_A_LOG == 0:
            log = written(chance)
        disk = copy_of(log.disk)
        name, start, extent = damage(disk, chance)
        found, error = read_until_damage(disk, chance.choice((None, 4000, 1 << 20)))
        case = (seed, name, start, extent, str(error))
        assert found == log.given[: len(found)], case
        before = [p for p in log.places if (p.path.name, p.offset + p.header.nbytes) <= (name, start)]
        if error is None:
            assert len(found) >= len(before), case
            # Nothing that is left proves that what is lost was acknowledged.
            lost = [sync_of(place) for place in log.places[len(found) :]]
            left = [sync_of(p) for p in log.places if p.path.name != name or not start - 80 < p.offset < start + extent]
            assert max(left, default=(0, 0)) <= min(lost, default=(9, 0)), case
        else:
            assert cut(disk, FOLDER) is not None, case
            kept, _ = contents(disk)
            assert found == kept[: len(found)] == log.given[: len(found)], case
            assert kept == log.given[: len(kept)], case
            assert error.reason is Reason.LOG_DAMAGED, case
            assert len(found) < len(log.given) or start < 4096, case
        outcomes[error is None] += 1
    assert min(outcomes.values()) > TEARS // 20


def two_syncs() -> tuple[MemoryDisk, list[LogRecord]]:
    """Return a log of two records with a sync each, then three with one sync."""
    disk = MemoryDisk()
    records = [Record(Kind.HOLD, bytes(16), entry, b"m", bytes([entry]) * 600) for entry in range(1, 6)]
    write_epoch(disk, 1, START, [records[:1], records[1:2], records[2:]], acknowledged=[])
    return disk, list(read_log(disk, FOLDER))


@pytest.mark.parametrize("part", [0, 200])
@pytest.mark.parametrize(("damaged", "kept"), [(0, None), (1, None), (2, 2), (3, 3), (4, 4)])
def test_a_bad_record_is_a_tail_unless_a_later_sync_follows(damaged: int, kept: int | None, part: int) -> None:
    disk, places = two_syncs()
    disk.files[places[damaged].path].content[places[damaged].offset + part] ^= 1
    found, error = read_until_damage(disk)
    if kept is None:
        assert error is not None
        assert error.metadata == {"path": str(places[damaged].path), "offset": str(places[damaged].offset)}
        assert "stepwire checkpoint repair --data-dir /data" in str(error)
        assert len(found) == damaged
    else:
        assert (len(found), error) == (kept, None)


def test_an_io_error_is_no_tail() -> None:
    disk, _ = two_syncs()
    disk.calls.clear()
    assert len(contents(disk)[0]) == 5
    for number in range(1, len(disk.calls) + 1):
        disk.before = failure = FailAt(number, errno.EIO)
        found, error = read_until_damage(disk)
        assert error is not None
        assert (error.reason, failure.left <= 0) == (Reason.DURABILITY_FAILED, True)
        assert "I/O error is no damage" in str(error)
        assert [read.record.entry for read in found] == list(range(1, len(found) + 1))


def test_a_payload_that_rots_after_it_was_found_is_not_returned() -> None:
    disk, places = two_syncs()
    disk.files[places[0].path].content[places[0].offset + 300] ^= 1
    with pytest.raises(DataLossError) as failed:
        places[0].read_payload()
    assert failed.value.reason is Reason.LOG_DAMAGED
    assert places[1].read_payload().tobytes() == bytes([2]) * 600


def test_the_end_is_not_told_before_it_is_known() -> None:
    disk, places = two_syncs()
    reader = read_log(disk, FOLDER)
    records = iter(reader)
    assert next(records).position == places[0].position
    with pytest.raises(RuntimeError, match="not read to its end"):
        _ = reader.end
    assert len(list(records)) == 4
    assert reader.end == (1, 5)


def test_an_empty_folder_has_an_empty_log() -> None:
    assert contents(MemoryDisk()) == ([], START)


def test_an_epoch_whose_first_head_was_torn_has_not_begun() -> None:
    disk, places = two_syncs()
    write_epoch(disk, 2, LogPosition(1, 5), [], acknowledged=[])
    name = segments_of(disk, FOLDER)[-1]
    disk.files[name.path].content[:512] = bytes(512)
    found, end = contents(disk)
    assert ([read.position for read in found], end) == ([place.position for place in places], (1, 5))


def test_a_bad_head_with_records_behind_it_is_damage() -> None:
    disk, _ = two_syncs()
    disk.files[segments_of(disk, FOLDER)[0].path].content[100] ^= 1
    found, error = read_until_damage(disk)
    assert error is not None
    assert (found, error.reason) == ([], Reason.LOG_DAMAGED)


def test_a_head_of_another_format_is_refused_as_such() -> None:
    disk, _ = two_syncs()
    (name,) = segments_of(disk, FOLDER)
    with SegmentReader(disk, name.path) as file:
        head = file.head()
    assert head is not None
    disk.files[name.path].content[:512] = encode_head(head._replace(format=2))
    _, error = read_until_damage(disk)
    assert "format 2 and this server reads format 1" in str(error)


def test_what_the_next_owner_had_not_read_is_never_read() -> None:
    """Owner 2 read three records of owner 1, who wrote two more, and owner 3 lost its data directory to owner 4."""
    disk, _ = two_syncs()
    record = Record(Kind.COMMIT, bytes(16), 9)
    for epoch, after in ((2, LogPosition(1, 3)), (3, LogPosition(2, 1)), (4, LogPosition(2, 1))):
        write_epoch(disk, epoch, after, [[record]], acknowledged=[])
    found, end = contents(disk)
    assert [read.position for read in found] == [(1, 1), (1, 2), (1, 3), (2, 1), (4, 1)]
    assert end == (4, 1)


def test_a_record_that_the_next_owner_had_read_may_not_be_missing() -> None:
    disk, places = two_syncs()
    write_epoch(disk, 2, LogPosition(1, 5), [], acknowledged=[])
    del disk.files[places[4].path].content[places[4].offset :]
    found, error = read_until_damage(disk)
    assert (len(found), error is not None) == (4, True)


def test_a_reader_puts_on_the_disk_what_it_has_read() -> None:
    """Its owner may have been killed before the sync, and the power may fail later."""
    disk, acknowledged = MemoryDisk(), list[Read]()
    writer = write_epoch(disk, 1, START, [], acknowledged=[])
    writer.append(Record(Kind.COMMIT, bytes(16), 1), last=True)
    writer.flush()
    found, end = contents(disk)
    write_epoch(disk, 2, end, [[Record(Kind.COMMIT, bytes(16), 2)]], acknowledged=acknowledged)
    for seed in range(10):
        assert contents(disk.after_power_loss(random.Random(seed)))[0] == found + acknowledged


def test_a_reader_beside_the_writer_reads_to_an_end_and_not_behind_it() -> None:
    """The record there may be torn just now, and that is nobody's damage."""
    disk, given, chance = MemoryDisk(), list[Read](), random.Random(5)
    write_epoch(disk, 1, START, random_batches(chance, 6), acknowledged=given)
    older = len(given)
    write_epoch(disk, 2, given[-1].position, random_batches(chance, 9) + random_batches(chance, 9), acknowledged=given)
    places = list(read_log(disk, FOLDER))
    torn = places[older + 2]
    disk.files[torn.path].content[torn.offset + 20] ^= 1
    for count in (0, 1, 2):
        reader = read_log(disk, FOLDER, up_to=LogPosition(2, count))
        assert list(records_of(reader)) == given[: older + count]
        assert reader.end == LogPosition(2, count)
    with pytest.raises(DataLossError):
        list(read_log(disk, FOLDER, up_to=LogPosition(2, 3)))
