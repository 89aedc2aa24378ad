"""The removal of segments that nobody needs any more."""

from __future__ import annotations

import itertools
import pathlib

from stepwire_server.durability.disk import Disk
from stepwire_server.durability.records import LogPosition
from stepwire_server.durability.segments import SegmentName, SegmentReader, segments_of

__all__ = ["remove_before"]


def remove_before(disk: Disk, folder: pathlib.Path, position: LogPosition) -> list[str]:
    """Remove the segments all of whose records lie before a place, the oldest first, and return their names.

    Args:
        disk: the system calls.
        folder: the folder of the log.
        position: the epoch and the number of the first record that is still needed.

    Raises:
        OSError: the disk failed; a removed file may come back.
    """
    names = segments_of(disk, folder)
    removed = []
    for name, following in itertools.zip_longest(names, names[1:]):
        if not _lies_before(disk, name, following, position):
            break
        disk.remove(name.path)
        removed.append(name.path.name)
    if removed:
        disk.sync_folder(folder)
    return removed


def _lies_before(disk: Disk, name: SegmentName, following: SegmentName | None, position: LogPosition) -> bool:
    if name.epoch != position.epoch:
        return name.epoch < position.epoch
    if following is None or following.epoch != name.epoch:
        return False
    with SegmentReader(disk, following.path) as file:
        head = file.head()
    return head is not None and head.number <= position.number
