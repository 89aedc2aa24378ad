"""Folders that are there whole or not at all: a new one gets its name last, and an old one loses its key file first."""

from __future__ import annotations

import errno
import os
import pathlib
import secrets
from typing import Final

import structlog

from stepwire.errors import InvalidRequestError
from stepwire_server.durability.disk import Disk

__all__ = ["NEW_PREFIX", "NewFolder", "is_folder", "name_taken", "remove_files"]

NEW_PREFIX: Final = ".new-"
"""The beginning of the names of folders that are not complete."""

_OCCUPIED: Final = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)

_log = structlog.get_logger()


def is_folder(disk: Disk, path: pathlib.Path) -> bool:
    """Tell whether a path is a folder, and no symbolic link to one.

    Raises:
        OSError: the disk failed, or nothing has that name.
    """
    try:
        descriptor = disk.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    disk.close(descriptor)
    return True


def remove_files(disk: Disk, folder: pathlib.Path, first: str) -> None:
    """Remove a folder with its files.

    Args:
        disk: the file system.
        folder: holds no folders.
        first: the file without which the folder counts for nothing. It is gone for good before another file is removed.

    Raises:
        OSError: the disk failed; calling again goes on.
    """
    names = disk.names(folder)
    if first in names:
        disk.remove(folder / first)
        disk.sync_folder(folder)
    for name in names:
        if name != first:
            disk.remove(folder / name)
    disk.remove_folder(folder)


def name_taken(name: str) -> InvalidRequestError:
    """Say that a checkpoint has a name already."""
    return InvalidRequestError.of("name", f"a checkpoint {name!r} exists; choose another name, or delete it first")


class NewFolder:
    """A folder under a name of its own, which gets the name that is meant for it once it is complete.

    Attributes:
        path: the folder as it is named now.
    """

    def __init__(
        self, disk: Disk, target: pathlib.Path, first: str, under_way: set[str], work: pathlib.Path | None = None
    ) -> None:
        """Choose a name; nothing is made.

        Args:
            disk: the file system.
            target: its path in the end.
            first: the file that `remove_files` is to remove first.
            under_way: has the folder's present name until `publish` or `discard`.
            work: the folder that it lies in until then; None for the target's own. An owner that was fenced has no such
                folder any more, so it can publish nothing.
        """
        self._disk = disk
        self._target = target
        self._first = first
        self._under_way = under_way
        self.path = (work or target.parent) / f"{NEW_PREFIX}{target.name}-{secrets.token_hex(8)}"
        under_way.add(self.path.name)

    def make(self) -> None:
        """Make the folder.

        Raises:
            OSError: the disk failed.
        """
        self._disk.make_folder(self.path)

    def publish(self) -> None:
        """Wait until the folder's names have reached the disk, give it its name, and wait for that.

        After a failure no folder has the name by this call, unless the disk fails at clearing up too.

        Raises:
            InvalidRequestError: something has that name; nothing is overwritten.
            OSError: the disk failed.
        """
        self._disk.sync_folder(self.path)
        if self._disk.exists(self._target):
            raise name_taken(self._target.name)
        try:
            self._disk.rename(self.path, self._target)
        except OSError as error:
            if error.errno in _OCCUPIED:
                raise name_taken(self._target.name) from None
            if not self._disk.exists(self.path):  # it failed after it was done
                self._discard(self._target)
            raise
        try:
            self._disk.sync_folder(self._target.parent)
        except BaseException:
            self._discard(self._target)
            raise
        self._under_way.discard(self.path.name)

    def discard(self) -> None:
        """Remove the folder if it is there; what cannot be removed is logged, and stays for a later `prune`."""
        self._discard(self.path)
        self._under_way.discard(self.path.name)

    def _discard(self, folder: pathlib.Path) -> None:
        try:
            remove_files(self._disk, folder, self._first)
        except FileNotFoundError:
            pass  # it was never made, or has its name by now
        except OSError as error:
            _log.warning("checkpoint not removed", folder=str(folder), error=str(error))
