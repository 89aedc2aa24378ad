"""Files of the operator: read if nobody else may write them, and again when they change."""

from __future__ import annotations

import os
import pathlib
import stat

from stepwire.errors import InvalidRequestError

__all__ = ["WatchedFiles", "read_owned"]


def read_owned(path: pathlib.Path, field: str, most_bytes: int) -> bytes:
    """Read a file that decides who may call; `field` names its setting.

    Raises:
        InvalidRequestError: it cannot be read, is larger, or others than its owner may write it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise InvalidRequestError.of(field, f"{str(path)!r} cannot be read: {error.strerror}") from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InvalidRequestError.of(field, f"others may write {str(path)!r}: `chmod go-w` it")
    if len(data) > most_bytes:
        raise InvalidRequestError.of(field, f"{str(path)!r} has more than {most_bytes} bytes")
    return data


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
