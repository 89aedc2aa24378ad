"""Folders that no other user can put something else in the place of."""

from __future__ import annotations

import os
import pathlib
import stat
from collections.abc import Iterator

__all__ = ["require_trusted_above"]

_MOST_LINKS = 40  # as the kernel has it


def require_trusted_above(path: pathlib.Path) -> None:
    """Refuse a path that another user could lead elsewhere, whoever owns its end.

    Every folder above it, and every link on the way, belongs to root or to this user. Others may write no such folder,
    unless it is sticky, as `/tmp` is: there they replace nothing of this user's.

    Raises:
        PermissionError: one does not.
    """
    for place in _above(path, _MOST_LINKS):
        status = place.lstat()
        foreign = status.st_uid not in (0, os.geteuid())
        if stat.S_ISLNK(status.st_mode):
            writable = False  # the mode of a link says nothing
        else:
            writable = bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) and not status.st_mode & stat.S_ISVTX
        if foreign or writable:
            raise PermissionError(f"{place}, above {path}, belongs to, or can be written by, another user")


def _above(path: pathlib.Path, links: int) -> Iterator[pathlib.Path]:
    """Yield the folders and links on the way to a path; of links also those on the way to their ends."""
    *above, end = reversed([path.absolute(), *path.absolute().parents])
    for place in [*above, *([end] if end.is_symlink() else [])]:
        yield place
        if place.is_symlink():
            if not links:
                raise OSError(f"{path} leads through too many links")
            yield from _above(place.parent / os.readlink(place), links - 1)
            target = place.resolve()
            if target != path:
                yield target
