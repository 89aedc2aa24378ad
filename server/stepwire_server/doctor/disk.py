"""The check of a data directory: whether it can be written, on which file system, and how it syncs."""

from __future__ import annotations

import errno
import os
import pathlib
import tempfile
import time
from typing import Final

from stepwire_server.engines.probe import Finding

__all__ = ["examine_data_directory", "existing_above", "file_system_of"]

_CHECK: Final = "data directory"
_PAGE: Final = 4096
_SYNCS: Final = 8
_MEMORY: Final = ("tmpfs", "ramfs")
_NETWORK: Final = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs")


def examine_data_directory(data_dir: str) -> list[Finding]:
    """Check the setting `data_dir`; nothing is left behind. Without one there is no finding."""
    if not data_dir:
        return []
    folder = existing_above(pathlib.Path(data_dir).absolute())
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".stepwire-") as file:
            direct, seconds = _accepts_direct(pathlib.Path(file.name)), _sync_seconds(file.fileno())
    except OSError as problem:
        return [Finding(_CHECK, False, f"{folder}: {problem}", f"name another --data-dir, or: chown $(id -u) {folder}")]
    kind = file_system_of(folder)
    detail = f"{folder} on {kind}, a sync in {seconds * 1e6:.0f} us, {'direct' if direct else 'buffered'} writes"
    if kind in _MEMORY:
        return [Finding(_CHECK, False, f"{detail}; this is memory", "name a --data-dir on a disk", optional=True)]
    if kind in _NETWORK:
        remedy = "name a --data-dir on a local file system: caches of names can hide a second server"
        return [Finding(_CHECK, False, detail, remedy, optional=True)]
    return [Finding(_CHECK, True, detail)]


def file_system_of(folder: pathlib.Path) -> str:
    """Return the type of the file system that a folder is on, such as "ext4"; "unknown" where nothing tells."""
    path, found = str(folder.resolve()), ("", "unknown")
    try:
        lines = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return found[1]
    for line in lines:
        place, kind = line.split()[4], line.partition(" - ")[2].split()[0]
        inside = path == place or path.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(found[0]):
            found = place, kind
    return found[1]


def existing_above(folder: pathlib.Path) -> pathlib.Path:
    """Return a folder, or the nearest one above it that exists: a server makes the rest."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _accepts_direct(path: pathlib.Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
    except OSError as problem:
        if problem.errno != errno.EINVAL:
            raise
        return False
    return True


def _sync_seconds(descriptor: int) -> float:
    """Return the middle time of a write of a page and its sync."""
    times = []
    for number in range(_SYNCS):
        began = time.perf_counter()
        os.pwrite(descriptor, bytes(_PAGE), number * _PAGE)
        os.fdatasync(descriptor)
        times.append(time.perf_counter() - began)
    return sorted(times)[_SYNCS // 2]
