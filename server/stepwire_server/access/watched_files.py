"""Files that are read again when they change."""

from __future__ import annotations

import os
import pathlib

__all__ = ["WatchedFiles"]


class WatchedFiles:
    """Tells when files have changed: by their times, sizes and inodes. A missing file is a change too."""

    def __init__(self, *paths: pathlib.Path) -> None:
        """Watch from now on."""
        self._paths = paths
        self._seen = self._stamps()

    def changed(self) -> bool:
        """Tell whether a file has changed since the last time that this was asked."""
        stamps = self._stamps()
        if stamps == self._seen:
            return False
        self._seen = stamps
        return True

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: pathlib.Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
