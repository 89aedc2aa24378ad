"""Pages of a private mapping: written by this process, or the file's own."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

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


_FORK = """
import mmap, os
import numpy as np
from stepwire.transports.host.pages import has_written_pages

descriptor = os.memfd_create("test")
os.ftruncate(descriptor, mmap.PAGESIZE)
memory = np.frombuffer(mmap.mmap(descriptor, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE), np.uint8)
asked = lambda: has_written_pages(memory.ctypes.data, memory.nbytes)
before = asked()
child = os.fork()
if child == 0:
    found = asked()
    memory[0] = 1
    os._exit(0 if (found, asked()) == (before, before if before is None else True) else 1)
print(before, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), asked())
"""


def test_a_child_asks_for_its_own_pages() -> None:
    """In a process of its own: frameworks that other tests have loaded warn of a fork."""
    found = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, check=True)
    assert found.stdout in ("False 0 False\n", "None 0 None\n")


@pytest.mark.parametrize("other", [None, "/dev/zero"], ids=["closed", "another file"])
def test_a_program_may_close_every_descriptor_that_it_does_not_know(
    mappings: tuple[np.ndarray, np.ndarray, mmap.mmap], other: str | None
) -> None:
    _, private, _ = mappings
    assert written(private) is False
    number = pages._page_map._opened.descriptor  # type: ignore[union-attr]
    os.close(number)
    if other is not None:
        opened = os.open(other, os.O_RDONLY)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
    private[0] = 1
    assert written(private) is True
    if other is not None:
        assert os.fstat(number).st_rdev == os.stat(other).st_rdev, "it is still open"
        os.close(number)


@pytest.mark.parametrize("path", ["/proc/self/there-is-none", "/dev/null"])
def test_a_kernel_that_does_not_tell(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_PAGEMAP", path)
    assert has_written_pages(PAGE, PAGE) is None
