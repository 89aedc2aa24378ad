"""The cut of a damaged log, which the operator decides on."""

from __future__ import annotations

import os
import pathlib
from typing import NamedTuple

from stepwire_server.durability.disk import Disk, read_all, write_all
from stepwire_server.durability.reading import find_damage
from stepwire_server.durability.records import LogPosition
from stepwire_server.durability.segments import segments_of

__all__ = ["Cut", "cut"]

COPY_BYTES = 4 << 20


class Cut(NamedTuple):
    """The effect of a cut.

    Attributes:
        path: the segment that was damaged.
        offset: the byte in it at which the log ends now.
        end: the last record that the log has now.
        set_aside: the files with everything behind the cut, under new names; no server reads them.
    """

    path: pathlib.Path
    offset: int
    end: LogPosition
    set_aside: list[pathlib.Path]


def cut(disk: Disk, folder: pathlib.Path) -> Cut | None:
    """End the log at its first damage; None if it has none. A cut that was interrupted is begun anew by the next one.

    Raises:
        OSError: the disk failed.
        DataLossError: the log has the format of a newer server.
    """
    damage = find_damage(disk, folder)
    if damage is None:
        return None
    names = segments_of(disk, folder)
    set_aside = [_set_aside(disk, name.path) for name in reversed(names) if name > damage.segment]
    path = damage.segment.path
    if damage.offset:
        shortened = _shortened(disk, path, damage.offset)
        set_aside.append(_free_name(disk, path))
        disk.link(path, set_aside[-1])
        disk.rename(shortened, path)
    else:
        set_aside.append(_set_aside(disk, path))
    disk.sync_folder(folder)
    return Cut(path, damage.offset, damage.after, set_aside[::-1])


def _set_aside(disk: Disk, path: pathlib.Path) -> pathlib.Path:
    target = _free_name(disk, path)
    disk.rename(path, target)
    return target


def _free_name(disk: Disk, path: pathlib.Path) -> pathlib.Path:
    number = 1
    while disk.exists(path.with_name(f"{path.name}.cut-{number}")):
        number += 1
    return path.with_name(f"{path.name}.cut-{number}")


def _shortened(disk: Disk, path: pathlib.Path, nbytes: int) -> pathlib.Path:
    """Return a copy of the first bytes of a segment, on the disk."""
    target = path.with_name(f"{path.name}.tmp")
    if disk.exists(target):
        disk.remove(target)
    source = disk.open(path, os.O_RDONLY)
    try:
        copy = disk.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for offset in range(0, nbytes, COPY_BYTES):
                part = memoryview(bytearray(min(COPY_BYTES, nbytes - offset)))
                write_all(disk, copy, part[: read_all(disk, source, part, offset)], offset)
            disk.sync(copy)
        finally:
            disk.close(copy)
    finally:
        disk.close(source)
    return target
