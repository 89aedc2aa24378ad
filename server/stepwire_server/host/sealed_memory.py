"""Memory that other processes of this host can map: made by the server, never by a client.

A client that names memory could name a file that shrinks, and the server would die of SIGBUS in the middle of somebody
else's step. So the server makes the memory, reserves every page, and seals the size. A page that is not there is missed
at once, as an error. A client can still scribble and, with write access, punch holes. A hole reads as zeros, so either
spoils that client's own gradient and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from types import TracebackType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stepwire.host.memory_map import LARGE_PAGE_BYTES, MemoryMap

__all__ = ["SharedMemory", "in_pages"]

# Linux 5.1; the module `fcntl` does not name it yet.
_F_SEAL_FUTURE_WRITE: Final = 0x10


class SharedMemory:
    """Zeroed memory with a descriptor to hand out. A context manager; closes twice without complaint.

    Arrays keep the mapping alive, so no computation on one can lose it. The mapping ends with the last array, and the
    memory itself once no process maps it.

    Attributes:
        nbytes: the bytes, a multiple of the page size.
    """

    def __init__(self, name: str, nbytes: int, *, read_only: bool = False) -> None:
        """Reserve, map and seal.

        Args:
            name: the name of the memory in /proc.
            nbytes: the bytes, rounded up to whole pages, at least one.
            read_only: other processes can map the descriptor only to read.

        Raises:
            OSError: the system has no memory or no descriptors left.
        """
        self.nbytes = in_pages(nbytes)
        with contextlib.ExitStack() as undo:
            descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, descriptor)
            os.ftruncate(descriptor, self.nbytes)
            mapping = _filled(descriptor, self.nbytes)
            self._mapping: MemoryMap | None = mapping
            self._descriptor: int | None = _sealed(descriptor, read_only=read_only)
            if self._descriptor == descriptor:
                undo.pop_all()

    @property
    def descriptor(self) -> int:
        """The descriptor for other processes; the caller keeps the memory from being closed meanwhile."""
        assert self._descriptor is not None
        return self._descriptor

    def duplicate(self) -> SharedMemory:
        """Return the same memory with a descriptor of its own, to be closed by itself.

        Raises:
            OSError: the system has no descriptors left.
        """
        twin = object.__new__(SharedMemory)
        twin.nbytes, twin._mapping, twin._descriptor = self.nbytes, self._mapping, os.dup(self.descriptor)
        return twin

    def array(self, dtype: np.dtype[Any], items: int) -> npt.NDArray[Any]:
        """Return the first items as an array, `(items,)`."""
        assert self._mapping is not None
        return self._mapping.array(dtype, items)

    def close(self) -> None:
        """Close the descriptor and drop the mapping. Closing twice is harmless."""
        descriptor, self._descriptor, self._mapping = self._descriptor, None, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> SharedMemory:
        """Use it for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def in_pages(nbytes: int) -> int:
    """Round up to whole pages, at least one: nothing can be mapped of nothing."""
    return -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE


def _filled(descriptor: int, nbytes: int) -> MemoryMap:
    """Map empty memory, and reserve its pages, large ones as far as the system has any.

    Raises:
        OSError: the system has no memory or no addresses left.
    """
    for start in range(0, nbytes - LARGE_PAGE_BYTES + 1, LARGE_PAGE_BYTES):
        os.posix_fallocate(descriptor, start, mmap.PAGESIZE)  # what is nothing yet is made no large page
    mapping = MemoryMap(descriptor, nbytes)
    mapping.make_large()
    os.posix_fallocate(descriptor, 0, nbytes)
    mapping.populate()
    return mapping


def _sealed(descriptor: int, *, read_only: bool) -> int:
    """Fix the size for good, and the ways to map it; returns the descriptor for other processes.

    The seal on future writing leaves our own mapping as it is. A kernel that does not know the seal gets a descriptor
    that was opened to be read. That one guards against mistakes, not against a process of the same user that opens it
    anew.
    """
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    handed_out = descriptor
    if read_only:
        try:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        except OSError as problem:
            if problem.errno != errno.EINVAL:
                raise
            handed_out = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    except BaseException:
        if handed_out != descriptor:
            os.close(handed_out)
        raise
    return handed_out
