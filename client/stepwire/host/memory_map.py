"""Mappings of shared memory that begin where the kernel can map large pages.

A step of 23 million parameters touches 90,000 pages of 4 KiB, and the processor knows some thousand places at a time.
Linux makes pages of 2 MiB of memory that is shared if a process asks (MADV_COLLAPSE, Linux 6.1), whatever the system's
setting for memory that nobody asks for. It maps one at once where addresses and places in the memory agree.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["LARGE_PAGE_BYTES", "MemoryMap", "map_over"]

LARGE_PAGE_BYTES: Final = 2 << 20
"""The size of a large page of x86-64, and of arm64 with small pages of 4 KiB."""

_MAP_NORESERVE: Final = 0x4000
_MAP_FIXED: Final = 0x10
_MADV_POPULATE_READ: Final = 22  # Linux 5.14, like the next
_MADV_POPULATE_WRITE: Final = 23
_MADV_COLLAPSE: Final = 25  # Linux 6.1


class MemoryMap:
    """Memory of a descriptor, from its start, in this process. It is unmapped with the last array that shows it.

    Attributes:
        nbytes: the bytes of the memory.
        owner: what the arrays keep alive.
    """

    def __init__(self, descriptor: int, nbytes: int, *, private: bool = False) -> None:
        """Map the memory.

        Args:
            descriptor: the memory, of at least `nbytes` bytes; it may be closed afterwards.
            nbytes: whole pages.
            private: writes are this process's own, and the memory may be one that nobody may write.

        Raises:
            OSError: there are no addresses, or the descriptor allows no such mapping.
        """
        self.nbytes, self._private = nbytes, private
        # Addresses first, as many as an aligned start takes, and then the memory in the middle of them: `mmap.mmap`
        # takes no address, and lets all of its own go at once.
        slack = LARGE_PAGE_BYTES if nbytes >= LARGE_PAGE_BYTES else 0
        self.owner = mmap.mmap(-1, nbytes + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        start = np.frombuffer(self.owner, np.uint8).ctypes.data
        self._offset = -start % LARGE_PAGE_BYTES if slack else 0
        map_over(start + self._offset, nbytes, descriptor, private=private)

    def array(self, dtype: npt.DTypeLike, items: int) -> npt.NDArray[Any]:
        """Return the first items as an array, `(items,)`."""
        return np.frombuffer(self.owner, dtype, items, self._offset)

    def make_large(self) -> None:
        """Have the kernel make large pages of the memory, as far as it has any; else it stays as it is."""
        if whole := self.nbytes // LARGE_PAGE_BYTES * LARGE_PAGE_BYTES:
            self._advise(_MADV_COLLAPSE, whole)

    def populate(self) -> None:
        """Have each page mapped now, and none copied; where an older kernel cannot, the first look takes longer."""
        self._advise(_MADV_POPULATE_READ if self._private else _MADV_POPULATE_WRITE, self.nbytes)

    def forget_writes(self) -> None:
        """Show the memory again in pages of a private mapping that this process has written."""
        self.owner.madvise(mmap.MADV_DONTNEED, self._offset, self.nbytes)

    def _advise(self, advice: int, nbytes: int) -> None:
        with contextlib.suppress(OSError):
            self.owner.madvise(advice, self._offset, nbytes)


def map_over(address: int, nbytes: int, descriptor: int, *, private: bool) -> None:
    """Map memory in the place of what is mapped there.

    Raises:
        OSError: the system refuses; what was there may be gone.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    flags = (mmap.MAP_PRIVATE if private else mmap.MAP_SHARED) | _MAP_FIXED
    access = mmap.PROT_READ | mmap.PROT_WRITE
    made = libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), access, flags, descriptor, ctypes.c_long(0))
    if made != address:
        number = ctypes.get_errno()
        raise OSError(number, f"{nbytes} bytes of shared memory cannot be mapped: {os.strerror(number)}")
