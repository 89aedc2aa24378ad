"""The epochs of a data directory: the newest one owns it."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import socket
from typing import Final

from stepwire.errors import FencedError, Reason
from stepwire_server.durability.disk import Disk, write_all

__all__ = ["Epochs"]

KEPT: Final = 8
_FENCED: Final = "fenced-"
_NAME = re.compile(r"[0-9a-f]{16}")


class Epochs:
    """The folder of epochs, which exists. Every method raises OSError if the disk fails."""

    def __init__(self, disk: Disk, folder: pathlib.Path) -> None:
        """Acquire nothing yet."""
        self._disk, self._folder = disk, folder

    def acquire(self, instance: str = "", least: int = 1) -> int:
        """Create the next epoch, and return its number; every older owner is fenced from then on.

        Args:
            instance: an id of the owner, for the people who read the file.
            least: the smallest number that the epoch may have.
        """
        epoch = max(self.newest() + 1, least)
        while not self._create(epoch, instance):
            epoch = max(epoch, self.newest()) + 1
        for old in self._numbers()[:-KEPT]:
            self._disk.remove(self._path(old))
        return epoch

    def work(self, epoch: int, root: pathlib.Path) -> pathlib.Path:
        """Make a folder for what the owner of an epoch has not completed, and remove those of older owners.

        An older owner that goes on has no such folder any more, so it can give nothing its final name. An owner that
        was overtaken before it had a folder finds out here.

        Args:
            epoch: the owner's epoch.
            root: the folder for the folders of all owners, which exists.

        Raises:
            FencedError: NOT_PRIMARY, another owner has a newer epoch.
        """
        work = root / f"{epoch:016x}"
        for name in self._disk.names(root):
            if _NAME.fullmatch(name) and int(name, 16) < epoch:
                self._disk.rename(root / name, root / f"{_FENCED}{name}")
        self._disk.sync_folder(root)
        for name in self._disk.names(root):
            if name.startswith(_FENCED):  # nobody writes there any more, so leftovers do no harm
                shutil.rmtree(root / name, ignore_errors=True)
        self._disk.make_folder(work)
        self._disk.sync_folder(root)
        if not self.is_owner(epoch):
            raise FencedError(
                f"another server has acquired the data directory after epoch {epoch}; connect to that one",
                reason=Reason.NOT_PRIMARY,
                metadata={"epoch": self.newest()},
            )
        return work

    def is_owner(self, epoch: int) -> bool:
        """Tell whether an epoch is the newest.

        A look for the next epoch alone would not do: an owner may be paused until that file was removed as an old
        one. The newest is never removed.
        """
        return self.newest() == epoch

    def newest(self) -> int:
        """Return the newest epoch; 0 before the first."""
        names = reversed(self._disk.names(self._folder))  # of one length, so sorted as their numbers are
        return next((int(name, 16) for name in names if _NAME.fullmatch(name)), 0)

    def _create(self, epoch: int, instance: str) -> bool:
        """Create an epoch; False if another owner has it or a newer one."""
        try:
            descriptor = self._disk.open(self._path(epoch), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        try:
            about = {"epoch": epoch, "pid": os.getpid(), "host": socket.gethostname(), "instance": instance}
            write_all(self._disk, descriptor, memoryview(json.dumps(about).encode() + b"\n"), 0)
            self._disk.sync(descriptor)
        finally:
            self._disk.close(descriptor)
        self._disk.sync_folder(self._folder)
        return self.is_owner(epoch)  # the number may have been in use and removed long ago

    def _path(self, epoch: int) -> pathlib.Path:
        return self._folder / f"{epoch:016x}"

    def _numbers(self) -> list[int]:
        return sorted(int(name, 16) for name in self._disk.names(self._folder) if _NAME.fullmatch(name))
