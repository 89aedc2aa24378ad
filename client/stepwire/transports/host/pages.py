"""Pages of a private mapping that this process has written: the kernel knows them."""

from __future__ import annotations

import mmap
import os
from typing import Final

import numpy as np

__all__ = ["has_written_pages"]

_PAGEMAP: Final = "/proc/self/pagemap"
_ENTRY_BYTES: Final = 8
_FILE: Final = np.uint64(1 << 61)
_IN_USE: Final = np.uint64(1 << 63 | 1 << 62)


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
    try:
        descriptor = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        raw = os.pread(descriptor, (last - first + 1) * _ENTRY_BYTES, first * _ENTRY_BYTES)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if len(raw) < (last - first + 1) * _ENTRY_BYTES:
        return None
    entries = np.frombuffer(raw, np.uint64)
    return bool((((entries & _IN_USE) != 0) & ((entries & _FILE) == 0)).any())
