"""Mappings of shared memory: aligned for large pages, and gone with the last array."""

from __future__ import annotations

import errno
import mmap
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import pytest

from stepwire.host import memory_map as module
from stepwire.host.memory_map import LARGE_PAGE_BYTES, MemoryMap, map_over

PAGE = mmap.PAGESIZE
NAME = "stepwire-mapped"


def memory_of(nbytes: int) -> int:
    descriptor = os.memfd_create(NAME)
    os.ftruncate(descriptor, nbytes)
    return descriptor


@pytest.fixture
def descriptor() -> Iterator[int]:
    descriptor = memory_of(3 * LARGE_PAGE_BYTES + PAGE)
    yield descriptor
    os.close(descriptor)


def mapped() -> int:
    return pathlib.Path("/proc/self/maps").read_text().count(f"memfd:{NAME}")


def large_bytes() -> int:
    """The bytes of the memory that are mapped by large pages."""
    areas = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", pathlib.Path("/proc/self/smaps").read_text())
    ours = [area for area in areas if f"memfd:{NAME}" in area]
    return sum(1024 * int(re.findall(r"ShmemPmdMapped: +(\d+) kB", area)[0]) for area in ours)


@pytest.mark.parametrize(
    ("nbytes", "alignment"),
    [(PAGE, PAGE), (LARGE_PAGE_BYTES - PAGE, PAGE), (LARGE_PAGE_BYTES, LARGE_PAGE_BYTES)]
    + [(3 * LARGE_PAGE_BYTES + PAGE, LARGE_PAGE_BYTES)],
)
@pytest.mark.parametrize("private", [False, True])
def test_a_mapping_shows_the_memory_to_its_last_byte(
    descriptor: int, nbytes: int, alignment: int, private: bool
) -> None:
    values = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    os.pwrite(descriptor, values.tobytes(), 0)
    mapping = MemoryMap(descriptor, nbytes, private=private)
    mapping.populate()
    shown = mapping.array(np.uint8, nbytes)
    assert (shown.ctypes.data % alignment, shown.tobytes()) == (0, values.tobytes())
    shown[[0, -1]] += 1
    written = values.copy()
    written[[0, -1]] += 1
    assert shown.tobytes() == written.tobytes()
    assert os.pread(descriptor, nbytes, 0) == (values if private else written).tobytes()


def test_writes_of_a_private_mapping_are_forgotten(descriptor: int) -> None:
    mapping = MemoryMap(descriptor, 3 * LARGE_PAGE_BYTES + PAGE, private=True)
    shown = mapping.array(np.float32, mapping.nbytes // 4)
    shown[:] = 1.0
    os.pwrite(descriptor, np.float32(2.0).tobytes(), 0)
    mapping.forget_writes()
    assert (shown[0], shown[1:].any()) == (2.0, False)


def test_memory_is_unmapped_with_its_last_array(descriptor: int) -> None:
    before = mapped()
    mapping = MemoryMap(descriptor, 2 * LARGE_PAGE_BYTES)
    values = mapping.array(np.uint8, 5)
    last = values[1:]
    assert mapped() == before + 1
    del mapping, values
    assert (mapped(), last.tolist()) == (before + 1, [0] * 4)
    del last
    assert mapped() == before


@pytest.mark.parametrize("private", [False, True])
def test_what_is_there_becomes_large_pages_with_its_content(private: bool) -> None:
    descriptor, nbytes = memory_of(2 * LARGE_PAGE_BYTES + PAGE), 2 * LARGE_PAGE_BYTES + PAGE
    values = np.random.default_rng(2).integers(0, 256, nbytes, np.uint8)
    os.pwrite(descriptor, values.tobytes(), 0)
    first = MemoryMap(descriptor, nbytes)
    first.make_large()
    assert first.array(np.uint8, nbytes).tobytes() == values.tobytes()
    if not large_bytes():
        pytest.skip("this system makes no large pages of shared memory")
    assert large_bytes() == 2 * LARGE_PAGE_BYTES
    other = MemoryMap(descriptor, nbytes, private=private)
    other.populate()
    assert other.array(np.uint8, nbytes).tobytes() == values.tobytes()
    assert large_bytes() == 4 * LARGE_PAGE_BYTES
    os.close(descriptor)


def test_a_kernel_that_knows_no_such_advice_maps_all_the_same(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MADV_COLLAPSE", "_MADV_POPULATE_READ", "_MADV_POPULATE_WRITE"):
        monkeypatch.setattr(module, name, 1000)
    for private in (False, True):
        mapping = MemoryMap(descriptor, LARGE_PAGE_BYTES, private=private)
        mapping.make_large()
        mapping.populate()
        assert not mapping.array(np.uint8, LARGE_PAGE_BYTES).any()


def test_memory_that_cannot_be_mapped_is_told_by_its_size(descriptor: int) -> None:
    to_read = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
    before = mapped()
    with pytest.raises(PermissionError, match="4096 bytes of shared memory cannot be mapped"):
        MemoryMap(to_read, 4096)
    assert mapped() == before
    os.close(to_read)
    with pytest.raises(OSError) as refused:
        map_over(0, PAGE, to_read, private=False)
    assert refused.value.errno == errno.EBADF
