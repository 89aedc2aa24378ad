"""A file system that is only read: for a look at a data directory that a server may own just now."""

from __future__ import annotations

import errno
import os
import pathlib

from stepwire_server.durability.disk import Disk

__all__ = ["ReadOnlyDisk"]


class ReadOnlyDisk(Disk):
    """A disk that nothing is written to. What is not on the disk yet is another one's concern, so nothing is synced."""

    def open(self, path: pathlib.Path, flags: int) -> int:
        """Open a file for reading; see `Disk`."""
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise _refused(path)
        return super().open(path, flags)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Refuse."""
        raise _refused(descriptor)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """Refuse."""
        raise _refused(descriptor)

    def sync(self, descriptor: int) -> None:
        """Do nothing."""

    def sync_folder(self, folder: pathlib.Path) -> None:
        """Do nothing."""

    def make_folder(self, folder: pathlib.Path) -> None:
        """Refuse."""
        raise _refused(folder)

    def rename(self, source: pathlib.Path, target: pathlib.Path) -> None:
        """Refuse."""
        raise _refused(source)

    def link(self, source: pathlib.Path, target: pathlib.Path) -> None:
        """Refuse."""
        raise _refused(source)

    def remove(self, path: pathlib.Path) -> None:
        """Refuse."""
        raise _refused(path)

    def remove_folder(self, folder: pathlib.Path) -> None:
        """Refuse."""
        raise _refused(folder)


def _refused(place: object) -> OSError:
    return OSError(errno.EROFS, os.strerror(errno.EROFS), str(place))
