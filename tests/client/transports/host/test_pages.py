"""Pages of a private mapping: written by this process, or the file's own."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from stepwire.transports.host import pages
from stepwire.transports.host.pages import has_written_pages

PAGE = mmap.PAGESIZE
PAGES = 5


@pytest.fixture
def mappings() -> tuple[np.ndarray, np.ndarray, mmap.mmap]:
    """The shared and the private mapping of one file, and the private one's memory."""
    descriptor = os.memfd_create("stepwire-test")
    os.ftruncate(descriptor, PAGES * PAGE)
    shared = mmap.mmap(descriptor, PAGES * PAGE)
    private = mmap.mmap(descriptor, PAGES * PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(descriptor)
    if has_written_pages(np.frombuffer(private, np.uint8).ctypes.data, PAGE) is None:
        pytest.skip("this kernel does not tell of pages (/proc/self/pagemap)")
    return np.frombuffer(shared, np.uint8), np.frombuffer(private, np.uint8), private


def written(array: np.ndarray) -> bool | None:
    return has_written_pages(array.ctypes.data, array.nbytes)


def test_a_page_is_written_until_its_writes_are_forgotten(mappings: tuple[np.ndarray, np.ndarray, mmap.mmap]) -> None:
    shared, private, memory = mappings
    assert written(private) is False
    shared[:] = 3  # the other side's writes
    assert private.sum() == 3 * PAGES * PAGE
    assert written(private) is False
    private[PAGE] = 3  # the same value
    assert written(private) is True
    assert written(private[:PAGE]) is False
    assert written(private[2 * PAGE :]) is False
    memory.madvise(mmap.MADV_DONTNEED)
    assert written(private) is False


def test_an_area_that_begins_and_ends_within_pages(mappings: tuple[np.ndarray, np.ndarray, mmap.mmap]) -> None:
    _, private, _ = mappings
    private[-1] = 1
    assert written(private[PAGE // 2 : -PAGE - 1]) is False
    assert written(private[PAGE // 2 : -PAGE + 1]) is True


@pytest.mark.parametrize("path", ["/proc/self/there-is-none", "/dev/null"])
def test_a_kernel_that_does_not_tell(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_PAGEMAP", path)
    assert has_written_pages(PAGE, PAGE) is None
