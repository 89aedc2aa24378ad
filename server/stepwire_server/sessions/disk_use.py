"""The bytes that a tenant's sessions hold on disk: checkpoints of those in memory and of parked ones."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable

__all__ = ["bytes_on_disk"]


def bytes_on_disk(folders: Iterable[pathlib.Path]) -> int:
    """Sum the bytes of all files in some folders, and in those in them; what is not there has none.

    Files that forks share count for each of them, as if they were alone. The log is not among them: it has a bound of
    its own.
    """
    total, left = 0, [str(folder) for folder in folders]
    while left:
        with contextlib.suppress(OSError), os.scandir(left.pop()) as entries:  # removed meanwhile
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
    return total
