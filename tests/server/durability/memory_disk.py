"""A disk in memory, which fails or loses its power at a chosen call."""

from __future__ import annotations

import errno
import os
import pathlib
import random
from collections.abc import Callable

from stepwire_server.durability.disk import Disk

SECTOR = 512


class File:
    """The content of a file: as it is, and as it was at the last sync."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.synced = b""


class PowerLoss(BaseException):
    """The end of everything that runs on a disk."""


class MemoryDisk(Disk):
    """Files in memory. `before` is called at every call with its name, and may raise."""

    def __init__(self, before: Callable[[str], None] = lambda name: None) -> None:
        self.files: dict[pathlib.Path, File] = {}
        self.folders: dict[pathlib.Path, dict[pathlib.Path, File]] = {}
        self.before = before
        self.calls: list[str] = []
        self._opened: dict[int, File] = {}
        self._next = 100

    def open(self, path: pathlib.Path, flags: int) -> int:
        self._call("open")
        if flags & os.O_CREAT:
            if path in self.files:
                raise FileExistsError(errno.EEXIST, "exists", str(path))
            self.files[path] = File()
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        self._next += 1
        self._opened[self._next] = self.files[path]
        return self._next

    def close(self, descriptor: int) -> None:
        self._call("close")
        del self._opened[descriptor]

    def write(self, descriptor: int, data: memoryview, offset: int) -> int:
        self._call("write")
        return self.put(self._opened[descriptor], bytes(data), offset)

    def put(self, file: File, data: bytes, offset: int) -> int:
        if offset > len(file.content):
            file.content.extend(bytes(offset - len(file.content)))
        file.content[offset : offset + len(data)] = data
        return len(data)

    def read(self, descriptor: int, out: memoryview, offset: int) -> int:
        self._call("read")
        data = self._opened[descriptor].content[offset : offset + out.nbytes]
        out[: len(data)] = data
        return len(data)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        self._call("allocate")
        content = self._opened[descriptor].content
        content.extend(bytes(max(0, nbytes - len(content))))

    def size(self, descriptor: int) -> int:
        self._call("size")
        return len(self._opened[descriptor].content)

    def sync(self, descriptor: int) -> None:
        self._call("sync")
        self._opened[descriptor].synced = bytes(self._opened[descriptor].content)

    def sync_folder(self, folder: pathlib.Path) -> None:
        self._call("sync_folder")
        self.folders[folder] = {path: file for path, file in self.files.items() if path.parent == folder}

    def names(self, folder: pathlib.Path) -> list[str]:
        self._call("names")
        return sorted(path.name for path in self.files if path.parent == folder)

    def exists(self, path: pathlib.Path) -> bool:
        self._call("exists")
        return path in self.files

    def rename(self, source: pathlib.Path, target: pathlib.Path) -> None:
        self._call("rename")
        self.files[target] = self.files.pop(source)

    def link(self, source: pathlib.Path, target: pathlib.Path) -> None:
        self._call("link")
        self.files[target] = self.files[source]

    def remove(self, path: pathlib.Path) -> None:
        self._call("remove")
        del self.files[path]

    @property
    def open_files(self) -> int:
        return len(self._opened)

    def after_power_loss(self, chance: random.Random) -> MemoryDisk:
        """Return the disk as it may be found: names and sectors that were not synced are there or not."""
        found = MemoryDisk()
        names = dict(self.files)
        kept = {path: file for files in self.folders.values() for path, file in files.items()}
        for path in sorted({*names, *kept}):
            file = names.get(path) or kept[path]
            if (path in names) != (path in kept) and chance.random() < 0.5:
                continue
            found.files[path] = File()
            found.files[path].content = torn(file, chance)
            found.files[path].synced = bytes(found.files[path].content)
        return found

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self.before(name)


def torn(file: File, chance: random.Random) -> bytearray:
    """Return the content of a file of whose unsynced sectors each is there or not."""
    content, likelihood = bytearray(file.content), chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    for start in range(0, len(content), SECTOR):
        old = file.synced[start : start + SECTOR]
        old += bytes(len(content[start : start + SECTOR]) - len(old))
        if content[start : start + SECTOR] != old and chance.random() < likelihood:
            content[start : start + SECTOR] = old
    if len(file.synced) < len(content) and chance.random() < 0.3:
        del content[chance.randint(len(file.synced), len(content)) :]
    return content


class FailAt:
    """Fails one call in a row of calls, counted from 1."""

    def __init__(self, number: int, error: int, only: str = "") -> None:
        self.left, self.error, self.only = number, error, only
        self.failed = ""

    def __call__(self, name: str) -> None:
        if not self.only or name == self.only:
            self.left -= 1
            if self.left == 0:
                self.failed = name
                raise OSError(self.error, os.strerror(self.error))
