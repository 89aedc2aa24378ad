"""The removal of segments that nobody needs."""

from __future__ import annotations

import random

from stepwire_server.durability.reading import read_log
from stepwire_server.durability.records import LogPosition
from stepwire_server.durability.retention import remove_before
from stepwire_server.durability.segments import segments_of
from tests.server.durability.logs import FOLDER, START, Read, contents, random_batches, write_epoch
from tests.server.durability.memory_disk import MemoryDisk


def test_exactly_the_segments_before_a_place_go_and_the_rest_is_read() -> None:
    given: list[Read] = []
    whole, chance = MemoryDisk(), random.Random(11)
    write_epoch(whole, 1, START, random_batches(chance, 8), acknowledged=given)
    write_epoch(whole, 2, given[-1].position, random_batches(chance, 8), acknowledged=given)
    places = list(read_log(whole, FOLDER))
    names = [name.path.name for name in segments_of(whole, FOLDER)]
    for place, position in [(place, place.position) for place in places]:
        disk = whole.after_power_loss(chance)
        removed = remove_before(disk, FOLDER, position)
        kept = names.index(place.path.name)
        assert removed in (names[:kept], names[: kept - 1])  # a segment may begin with the record itself
        found, end = contents(disk)
        assert found == given[len(given) - len(found) :]
        assert position in [read.position for read in found]
        assert end == given[-1].position


def test_the_present_segment_stays() -> None:
    disk = MemoryDisk()
    writer = write_epoch(disk, 1, START, random_batches(random.Random(2), 9), acknowledged=[])
    remove_before(disk, FOLDER, LogPosition(1, writer.number + 1))
    assert [name.segment for name in segments_of(disk, FOLDER)] == [writer.segments - 1]
    assert contents(disk)[1] == (1, writer.number)


def test_nothing_older_than_the_first_record_goes_within_an_epoch() -> None:
    disk = MemoryDisk()
    write_epoch(disk, 1, START, random_batches(random.Random(2), 9), acknowledged=[])
    assert remove_before(disk, FOLDER, LogPosition(1, 1)) == []
