"""The system calls that durable state is written and read by: the one place where a disk can fail.

Tests put a disk that fails in the place of this one.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

__all__ = ["Disk", "read_all", "write_all", "write_new"]


class Disk:
    """A file system. Every method raises OSError as the system does."""

    def open(self, path: pathlib.Path, flags: int) -> int:
        """Open a file; a new one is readable by this user alone. A symbolic link is not followed."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def close(self, descriptor: int) -> None:
        """Close a file."""
        os.close(descriptor)

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        """Write bytes at an offset, and return how many were written."""
        return os.pwrite(descriptor, data, offset)

    def read(self, descriptor: int, out: memoryview, offset: int) -> int:
        """Read bytes at an offset into `out`, and return how many were read: 0 at the end of the file."""
        return os.preadv(descriptor, [out], offset)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """Have the file system set aside the bytes of a file, so that writing into them needs no more room."""
        os.posix_fallocate(descriptor, 0, nbytes)

    def size(self, descriptor: int) -> int:
        """Return the bytes of a file."""
        return os.fstat(descriptor).st_size

    def sync(self, descriptor: int) -> None:
        """Wait until the content of a file has reached the disk."""
        os.fdatasync(descriptor)

    def sync_folder(self, folder: pathlib.Path) -> None:
        """Wait until the names in a folder have reached the disk."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_folder(self, folder: pathlib.Path) -> None:
        """Make a folder for this user alone; it must not exist."""
        folder.mkdir(mode=0o700)

    def names(self, folder: pathlib.Path) -> list[str]:
        """Return the names in a folder, sorted."""
        return sorted(os.listdir(folder))

    def exists(self, path: pathlib.Path) -> bool:
        """Tell whether something has a name."""
        return os.path.lexists(path)

    def rename(self, source: pathlib.Path, target: pathlib.Path) -> None:
        """Give a file or a folder another name; a folder replaces none that holds something."""
        os.rename(source, target)

    def link(self, source: pathlib.Path, target: pathlib.Path) -> None:
        """Give a file a second name, which must be free."""
        os.link(source, target, follow_symlinks=False)

    def remove(self, path: pathlib.Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def remove_folder(self, folder: pathlib.Path) -> None:
        """Remove an empty folder."""
        os.rmdir(folder)


def write_all(disk: Disk, descriptor: int, data: memoryview, offset: int) -> None:
    """Write all bytes at an offset, in as many calls as it takes.

    Raises:
        OSError: the disk failed; some of the bytes may have been written.
    """
    rest = data.cast("B")
    while rest.nbytes:
        written = disk.write(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def read_all(disk: Disk, descriptor: int, out: memoryview, offset: int) -> int:
    """Read at an offset until `out` is full or the file ends, and return how many bytes were read.

    Raises:
        OSError: the disk failed.
    """
    done = 0
    while done < out.nbytes and (count := disk.read(descriptor, out[done:], offset + done)):
        done += count
    return done


def write_new(disk: Disk, path: pathlib.Path, parts: Iterable[bytes]) -> None:
    """Write a new file from its parts, and wait until its content has reached the disk.

    Raises:
        OSError: the disk failed; the file may be there in part.
    """
    descriptor, offset = disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), 0
    try:
        for part in parts:
            write_all(disk, descriptor, memoryview(part), offset)
            offset += len(part)
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)
