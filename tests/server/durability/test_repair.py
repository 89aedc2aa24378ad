"""The cut of a damaged log."""

from __future__ import annotations

import errno
import pathlib
import random

import pytest

from stepwire_server.durability.disk import Disk
from stepwire_server.durability.reading import read_log
from stepwire_server.durability.records import Kind, LogPosition, Record
from stepwire_server.durability.repair import cut
from stepwire_server.durability.segments import SegmentWriter, segments_of
from tests.server.durability.logs import FOLDER, START, Read, contents, random_batches, write_epoch
from tests.server.durability.memory_disk import FailAt, MemoryDisk


def damaged() -> tuple[MemoryDisk, list[Read]]:
    """Return a log of two epochs with damage in the middle of the first, and the records before it."""
    disk, given = MemoryDisk(), list[Read]()
    chance = random.Random(3)
    write_epoch(disk, 1, START, random_batches(chance, 9) + random_batches(chance, 9), acknowledged=given)
    end = contents(disk)[1]
    write_epoch(disk, 2, end, random_batches(chance, 3), acknowledged=[])
    places = list(read_log(disk, FOLDER))
    place = places[len(given) // 2]
    disk.files[place.path].content[place.offset + 20] ^= 1
    return disk, given[: len(given) // 2]


def test_a_cut_ends_the_log_at_the_damage_and_keeps_all_files() -> None:
    disk, good = damaged()
    before = {bytes(file.content) for file in disk.files.values()}
    done = cut(disk, FOLDER)
    assert done is not None
    assert contents(disk) == (good, good[-1].position)
    assert (done.end, done.path in disk.files) == (good[-1].position, True)
    assert before <= {bytes(file.content) for file in disk.files.values()}
    assert set(done.set_aside) == {path for path in disk.files if path.name.endswith(".cut-1")}
    assert cut(disk, FOLDER) is None


def test_a_cut_log_goes_on() -> None:
    disk, good = damaged()
    cut(disk, FOLDER)
    end = contents(disk)[1]
    later: list[Read] = []
    write_epoch(disk, 3, end, [[Record(Kind.COMMIT, bytes(16), 1)]], acknowledged=later)
    assert contents(disk)[0] == good + later


def test_a_sound_log_is_not_cut() -> None:
    disk = MemoryDisk()
    write_epoch(disk, 1, START, random_batches(random.Random(1), 5), acknowledged=[])
    names = segments_of(disk, FOLDER)
    assert cut(disk, FOLDER) is None
    assert segments_of(disk, FOLDER) == names


def test_a_bad_head_sets_its_whole_segment_aside() -> None:
    disk, given = MemoryDisk(), list[Read]()
    write_epoch(disk, 1, START, random_batches(random.Random(1), 5), acknowledged=given)
    write_epoch(disk, 2, given[-1].position, [[Record(Kind.COMMIT, bytes(16), 1)]], acknowledged=[])
    last = segments_of(disk, FOLDER)[-1]
    disk.files[last.path].content[9] ^= 1
    done = cut(disk, FOLDER)
    assert done is not None
    assert (done.offset, done.set_aside) == (0, [last.path.with_name(f"{last.path.name}.cut-1")])
    assert contents(disk)[0] == given


def test_an_interrupted_cut_is_finished_by_the_next() -> None:
    whole, good = damaged()
    whole.calls.clear()
    cut(whole, FOLDER)
    for number in range(1, len(whole.calls) + 1):
        disk, _ = damaged()
        disk.before = FailAt(number, errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            cut(disk, FOLDER)
        cut(disk, FOLDER)
        assert contents(disk) == (good, good[-1].position)


def test_a_cut_works_on_a_real_disk(tmp_path: pathlib.Path) -> None:
    disk = Disk()
    writer = SegmentWriter(disk, tmp_path, 1, after=START, segment_bytes=1 << 16)
    for entry in range(1, 4):
        writer.append(Record(Kind.COMMIT, bytes(16), entry, b"", bytes(20_000)), last=True)
        writer.sync()
    writer.close()
    place = list(read_log(disk, tmp_path))[1]
    content = bytearray(place.path.read_bytes())
    content[place.offset] ^= 1
    place.path.write_bytes(content)
    done = cut(disk, tmp_path)
    assert done is not None
    assert (done.offset, done.end) == (place.offset, LogPosition(1, 1))
    assert [found.header.entry for found in read_log(disk, tmp_path)] == [1]
    assert done.set_aside[0].read_bytes() == content
