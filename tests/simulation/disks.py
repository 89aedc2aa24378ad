"""A disk that a server shares with the server before it, and that loses what was not synced when the power fails.

The files lie in a real folder. Beside them the disk remembers what to undo: old bytes of files that were not synced,
and names that their folder was not synced for. A loss of power undoes any of the sectors, and the last names of a
folder as a journaling file system does: in the order in which they were made.
"""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Final

from stepwire_server.durability.disk import Disk
from tests.simulation.runtime import Killed, Process, Scheduler

__all__ = ["SharedDisk", "SimulatedDisk"]

_SECTOR: Final = 512
_SYNC_SECONDS: Final = 0.004
_SWITCHED: Final = 0.2


class _Content:
    """The bytes of a file that the disk does not have yet."""

    def __init__(self) -> None:
        self.old: list[tuple[int, bytes]] = []
        self.synced_bytes: int | None = None


class SharedDisk:
    """The knowledge of the machine about a folder, beyond its files.

    Attributes:
        folder: the data directory.
        losses: the number of times that the power failed.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.losses = 0
        self.contents: dict[int, _Content] = {}
        self.names: dict[pathlib.Path, list[Callable[[], object]]] = {}

    def named(self, folder: pathlib.Path, undo: Callable[[], object]) -> None:
        """Note a change of a name, and the way back."""
        self.names.setdefault(folder, []).append(undo)

    def lose_power(self, scheduler: Scheduler) -> None:
        """Lose any part of what was not synced."""
        chance = scheduler.chance
        self.losses += 1
        paths = {path.stat().st_ino: path for path in self.folder.rglob("*") if path.is_file()}
        for inode, content in self.contents.items():
            if inode in paths:
                self._tear(paths[inode], content, scheduler)
        self.contents.clear()
        for undone in self.names.values():
            for undo in reversed(undone[chance.randint(0, len(undone)) :]):
                undo()
        self.names.clear()

    def _tear(self, path: pathlib.Path, content: _Content, scheduler: Scheduler) -> None:
        chance, present = scheduler.chance, bytearray(path.read_bytes())
        old, likelihood = bytearray(present), chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        for offset, before in reversed(content.old):
            old[offset : offset + len(before)] = before
        for start in range(0, len(present), _SECTOR):
            end = start + _SECTOR
            if present[start:end] != old[start:end] and chance.random() < likelihood:
                present[start:end] = old[start:end]
        if content.synced_bytes is not None and content.synced_bytes < len(present) and chance.random() < 0.3:
            del present[chance.randint(content.synced_bytes, len(present)) :]
        path.write_bytes(present)


class SimulatedDisk(Disk):
    """The disk as one server process uses it.

    Attributes:
        before: called before each call with its name and path; may end the process.
    """

    def __init__(self, shared: SharedDisk, scheduler: Scheduler, process: Process) -> None:
        self._shared, self._scheduler, self._process = shared, scheduler, process
        self._paths: dict[int, pathlib.Path] = {}
        self.before: Callable[[str, pathlib.Path | None], object] = lambda name, path: None

    def open(self, path: pathlib.Path, flags: int) -> int:
        self._call("open", path)
        if flags & os.O_DIRECT:  # as a file system without it
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        if flags & os.O_ACCMODE == os.O_WRONLY:  # old bytes are read before they are written over
            flags = flags & ~os.O_ACCMODE | os.O_RDWR
        descriptor = super().open(path, flags)
        self._paths[descriptor] = path
        if flags & os.O_EXCL:
            self._shared.named(path.parent, lambda: path.unlink(missing_ok=True))
        return descriptor

    def close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        super().close(descriptor)
        self._check()

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        self._call("write", self._paths.get(descriptor))
        info = os.fstat(descriptor)
        content = self._shared.contents.setdefault(info.st_ino, _Content())
        if content.synced_bytes is None:
            content.synced_bytes = info.st_size
        before = os.pread(descriptor, data.nbytes, offset)
        content.old.append((offset, before + bytes(data.nbytes - len(before))))
        return super().write(descriptor, data, offset)

    def read(self, descriptor: int, out: memoryview, offset: int) -> int:
        self._check()
        return super().read(descriptor, out, offset)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        self._call("allocate", self._paths.get(descriptor))
        super().allocate(descriptor, nbytes)

    def sync(self, descriptor: int) -> None:
        self._call("sync", self._paths.get(descriptor), _SYNC_SECONDS)
        super().sync(descriptor)
        self._shared.contents.pop(os.fstat(descriptor).st_ino, None)

    def sync_folder(self, folder: pathlib.Path) -> None:
        self._call("sync_folder", folder, _SYNC_SECONDS)
        self._shared.names.pop(folder, None)

    def make_folder(self, folder: pathlib.Path) -> None:
        self._call("make_folder", folder)
        super().make_folder(folder)
        self._shared.named(folder.parent, lambda: shutil.rmtree(folder, ignore_errors=True))

    def names(self, folder: pathlib.Path) -> list[str]:
        self._call("names", folder)
        return super().names(folder)

    def rename(self, source: pathlib.Path, target: pathlib.Path) -> None:
        self._call("rename", target)
        super().rename(source, target)

        def undo() -> None:
            if target.exists() and source.parent.exists() and not source.exists():
                os.rename(target, source)

        self._shared.named(target.parent, undo)

    def link(self, source: pathlib.Path, target: pathlib.Path) -> None:
        self._call("link", target)
        super().link(source, target)
        self._shared.named(target.parent, lambda: target.unlink(missing_ok=True))

    def remove(self, path: pathlib.Path) -> None:
        self._call("remove", path)
        kept = path.read_bytes()
        super().remove(path)

        def undo() -> None:
            if path.parent.exists() and not path.exists():
                path.write_bytes(kept)

        self._shared.named(path.parent, undo)

    def remove_folder(self, folder: pathlib.Path) -> None:
        self._call("remove_folder", folder)
        super().remove_folder(folder)
        self._shared.names.pop(folder, None)

    def _call(self, name: str, path: pathlib.Path | None, seconds: float = 0.0) -> None:
        self._check()
        if self._scheduler.running is not None:
            self.before(name, path)
            if seconds:
                self._scheduler.sleep(self._scheduler.chance.uniform(0.1, 1.0) * seconds)
            else:
                self._scheduler.give_way(_SWITCHED)
        self._check()

    def _check(self) -> None:
        if self._process.dead:
            raise Killed
