"""Pages of a private mapping that this process has written: the kernel knows them."""

from __future__ import annotations

import mmap
import os
from typing import Final, NamedTuple

import numpy as np

__all__ = ["has_written_pages"]

_PAGEMAP: Final = "/proc/self/pagemap"
_ENTRY_BYTES: Final = 8
_FILE: Final = np.uint64(1 << 61)
_IN_USE: Final = np.uint64(1 << 63 | 1 << 62)


class _Opened(NamedTuple):
    """An open account of pages: where, in which process, and what tells it from another file of the same number."""

    path: str
    process_id: int
    descriptor: int
    file: tuple[int, int]


class _PageMap:
    """The kernel's account of this process's pages, which stays open: a parent's account is not its child's.

    It is never closed: a program may have closed it, with every descriptor that it did not know, and its number may be
    another file's by now.

    Attributes:
        unwritten: the last entries that tell of no write.
    """

    def __init__(self) -> None:
        self.unwritten = b""
        self._opened: _Opened | None = None

    def entries(self, first: int, count: int) -> bytes | None:
        """Return the entries of some pages; None where the kernel does not tell."""
        try:
            opened = self._opened
            if opened is None or not _is_present(opened):
                self._opened = opened = _open()
            raw = os.pread(opened.descriptor, count * _ENTRY_BYTES, first * _ENTRY_BYTES)
        except OSError:
            return None
        return raw if len(raw) == count * _ENTRY_BYTES else None


def _is_present(opened: _Opened) -> bool:
    if (opened.path, opened.process_id) != (_PAGEMAP, os.getpid()):
        return False
    try:
        return _file_of(opened.descriptor) == opened.file
    except OSError:
        return False


def _open() -> _Opened:
    descriptor = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    return _Opened(_PAGEMAP, os.getpid(), descriptor, _file_of(descriptor))


def _file_of(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


_page_map = _PageMap()


def has_written_pages(address: int, nbytes: int) -> bool | None:
    """Tell whether this process has written a page of a private mapping since it last forgot its writes.

    A page without writes is the file's own, and a page with a write is a copy of this process. So the answer is exact,
    and costs 8 bytes of reading for each page.

    Args:
        address: the start of an area of the mapping.
        nbytes: the size of the area, at least 1.

    Returns:
        Whether a page was written; None where the kernel does not tell.
    """
    first, last = address // mmap.PAGESIZE, (address + nbytes - 1) // mmap.PAGESIZE
    if (raw := _page_map.entries(first, last - first + 1)) is None:
        return None
    if raw == _page_map.unwritten:  # as almost always
        return False
    entries = np.frombuffer(raw, np.uint64)
    if (((entries & _IN_USE) != 0) & ((entries & _FILE) == 0)).any():
        return True
    _page_map.unwritten = raw
    return False
