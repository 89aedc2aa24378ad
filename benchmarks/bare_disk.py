"""The floor of a journal: plain writes into a file whose room was set aside, each followed by one sync.

A file goes on through its room as a log does, so each block is written for the first time until the room is used up.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import pathlib
import time
from collections.abc import Iterator

from contest import Action
from stepwire_server.durability.disk import Disk

__all__ = ["BareFile", "SlowDisk", "evict", "read_files"]

_BLOCK_BYTES = 4096
_WRITE_BYTES = 8 << 20
_READ_BYTES = 4 << 20


class SlowDisk(Disk):
    """A disk whose syncs have a shortest time.

    Attributes:
        syncs: the syncs so far.
    """

    def __init__(self, sync_seconds: float = 0.0) -> None:
        """Let each sync last this long at least."""
        self._sync_seconds = sync_seconds
        self.syncs = 0

    def sync(self, descriptor: int) -> None:
        """See `Disk`."""
        ends = time.perf_counter() + self._sync_seconds
        super().sync(descriptor)
        self.syncs += 1
        if (rest := ends - time.perf_counter()) > 0:
            time.sleep(rest)


class BareFile:
    """A file that is written in one direction, around the page cache where the file system allows it.

    Attributes:
        direct: the file system accepts O_DIRECT.
    """

    def __init__(self, path: pathlib.Path, room_bytes: int, disk: Disk | None = None) -> None:
        """Create the file and set its room aside."""
        self._disk = disk or Disk()
        self._path = path
        self._room_bytes = room_bytes
        self._offset = 0
        self._memory = memoryview(mmap.mmap(-1, _WRITE_BYTES))  # begins at a page
        self._memory[:] = b"\1" * _WRITE_BYTES
        plain = self._disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._disk.allocate(plain, room_bytes)
        self._disk.sync(plain)
        self._descriptor, self.direct = self._directly(plain)

    def writer(self, nbytes: int) -> Action:
        """Return the action that writes so many bytes, a multiple of 4096, and waits for the disk."""
        return lambda: self._write(nbytes)

    def close(self) -> None:
        """Remove the file."""
        self._disk.close(self._descriptor)
        self._disk.remove(self._path)

    def _write(self, nbytes: int) -> None:
        if self._offset + nbytes > self._room_bytes:
            self._offset = 0
        end = self._offset + nbytes
        while self._offset < end:
            part = self._memory[: min(end - self._offset, _WRITE_BYTES)]
            self._offset += self._disk.write(self._descriptor, part, self._offset)
        self._disk.sync(self._descriptor)

    def _directly(self, plain: int) -> tuple[int, bool]:
        """Return a descriptor that bypasses the page cache; the plain one if the file system refuses."""
        try:
            direct = self._disk.open(self._path, os.O_WRONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return plain, False
        try:
            self._disk.write(direct, self._memory[:_BLOCK_BYTES], 0)
        except OSError as error:
            self._disk.close(direct)
            if error.errno != errno.EINVAL:
                raise
            return plain, False
        self._disk.close(plain)
        return direct, True


def evict(folder: pathlib.Path) -> None:
    """Have the page cache forget the files below a folder, so that they are read from the disk."""
    for path in _files(folder):
        with _opened(path) as descriptor:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def read_files(folder: pathlib.Path) -> int:
    """Read the files below a folder once, one after another, and return their bytes."""
    out, total = memoryview(bytearray(_READ_BYTES)), 0
    for path in _files(folder):
        with _opened(path) as descriptor:
            while count := os.readv(descriptor, [out]):
                total += count
    return total


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
