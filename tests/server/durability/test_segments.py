"""Files of the log: their names, where bytes lie in them, and O_DIRECT or not."""

from __future__ import annotations

import errno
import os
import pathlib
import random

import numpy as np
import pytest

from stepwire_server.durability.disk import Disk
from stepwire_server.durability.reading import read_log
from stepwire_server.durability.records import Kind, Record
from stepwire_server.durability.segments import SegmentReader, SegmentWriter, segments_of
from tests.server.durability.logs import FOLDER, START, random_record, records_of
from tests.server.durability.memory_disk import FailAt, MemoryDisk


def record(nbytes: int, entry: int = 1) -> Record:
    return Record(Kind.CHUNK, bytes(range(16)), entry, b"meta", bytes(nbytes % 251 for _ in range(nbytes)))


class Refusing(MemoryDisk):
    """Refuses O_DIRECT: at the opening, or only at the first write."""

    def __init__(self, *, at_write: bool) -> None:
        super().__init__()
        self.at_write, self.direct = at_write, {0}

    def open(self, path: pathlib.Path, flags: int) -> int:
        if flags & os.O_DIRECT and not self.at_write:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        descriptor = super().open(path, flags)
        if flags & os.O_DIRECT:
            self.direct.add(descriptor)
        return descriptor

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor in self.direct:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return super().write(descriptor, data, offset)


class Aligned(Disk):
    """A real disk on which every write is a multiple of 4096 bytes, at one, from memory at one."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int]] = []

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        address = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
        assert (offset % 4096, data.nbytes % 4096, address % 4096) == (0, 0, 0)
        self.writes.append((offset, data.nbytes))
        return super().write(descriptor, data, offset)


def test_a_segment_has_its_name_its_size_and_its_mode(tmp_path: pathlib.Path) -> None:
    SegmentWriter(Disk(), tmp_path, 0x1A, after=START, segment_bytes=1 << 20).close()
    (path,) = tmp_path.iterdir()
    assert path.name == "000000000000001a-00000000.log"
    assert (path.stat().st_size, path.stat().st_mode & 0o777) == (1 << 20, 0o600)


def test_what_is_written_is_read_on_a_real_disk_by_aligned_writes_alone(tmp_path: pathlib.Path) -> None:
    disk, chance, given = Aligned(), random.Random(5), []
    writer = SegmentWriter(disk, tmp_path, 1, after=START, segment_bytes=1 << 16)
    for index in range(60):
        given.append(random_record(chance) if index != 30 else record(9 << 20))
        last = index % 7 == 6
        assert writer.append(given[-1], last=last) == index + 1
        if last:
            writer.sync()
        elif index % 3 == 0:
            writer.flush()
    writer.sync()
    writer.close()
    assert [read.record for read in records_of(read_log(Disk(), tmp_path))] == given
    assert writer.segments == len(segments_of(disk, tmp_path)) > 3


def test_after_a_sync_no_block_is_written_again(tmp_path: pathlib.Path) -> None:
    disk = Aligned()
    writer = SegmentWriter(disk, tmp_path, 1, after=START)
    ends = []
    for entry in range(1, 6):
        disk.writes.clear()
        writer.append(record(100, entry))
        writer.flush()
        writer.append(record(700, entry), last=True)
        writer.sync()
        ends += [min(offset for offset, _ in disk.writes), max(offset + nbytes for offset, nbytes in disk.writes)]
    writer.close()
    assert ends[0] == 4096
    assert ends[2::2] == ends[1:-1:2]


def test_a_record_larger_than_a_segment_has_one_of_its_own_size() -> None:
    disk = MemoryDisk()
    writer = SegmentWriter(disk, FOLDER, 1, after=START, segment_bytes=8192)
    for nbytes in (100, 100_000, 100):
        writer.append(record(nbytes), last=True)
        writer.sync()
    sizes = [len(disk.files[name.path].content) for name in segments_of(disk, FOLDER)]
    assert sizes == [8192, 4096 + 102400, 8192]


@pytest.mark.parametrize("at_write", [False, True])
def test_a_file_system_without_o_direct_is_written_without(at_write: bool) -> None:
    disk = Refusing(at_write=at_write)
    writer = SegmentWriter(disk, FOLDER, 1, after=START, segment_bytes=8192)
    assert not writer.direct
    for entry in range(1, 30):
        writer.append(record(1000, entry), last=True)
        writer.sync()
    assert (writer.direct, writer.segments > 2) == (False, True)
    assert [read.record.entry for read in records_of(read_log(disk, FOLDER))] == list(range(1, 30))
    writer.close()
    assert disk.open_files == 0


def test_a_failed_creation_leaves_no_file_open() -> None:
    whole = MemoryDisk()
    SegmentWriter(whole, FOLDER, 1, after=START)
    for number in range(1, len(whole.calls)):
        disk = MemoryDisk(FailAt(number, errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            SegmentWriter(disk, FOLDER, 1, after=START)
        assert disk.open_files == 0


def test_other_names_are_left_alone(tmp_path: pathlib.Path) -> None:
    for name in ("0000000000000001-00000000.log.cut-1", "x.log", "0000000000000001-00000001.log", "README"):
        (tmp_path / name).touch()
    assert [name[:2] for name in segments_of(Disk(), tmp_path)] == [(1, 1)]


def test_headers_are_found_wherever_they_lie_and_not_in_payloads() -> None:
    """A payload that looks like a record is skipped with its own record."""
    disk = MemoryDisk()
    writer = SegmentWriter(disk, FOLDER, 1, after=START)
    for entry in range(1, 4):
        writer.append(record(1000, entry))
    writer.sync()
    (name,) = segments_of(disk, FOLDER)
    inner = bytes(disk.files[name.path].content[4096 : 4096 + 512])
    writer.append(Record(Kind.CHUNK, bytes(16), 4, bytes(512 - 80), inner * 3), last=True)
    writer.sync()
    with SegmentReader(disk, name.path) as file:
        assert [header.entry for _, header in file.headers(0)] == [1, 2, 3, 4]
        assert [header.entry for _, header in file.headers(4096 + 1536)] == [2, 3, 4]
