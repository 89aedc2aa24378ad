"""The directory of a cluster, in the process of a Ray actor, for clients that do not see its folder."""

from __future__ import annotations

import pathlib

from stepwire.errors import UnavailableError
from stepwire.wire.directory import ShardDirectory

__all__ = ["DirectoryReader"]


class DirectoryReader:
    """Reads the create-only files of the directory, and keeps nothing: it may be made anew at any time."""

    def __init__(self, folder: str) -> None:
        """Read a folder."""
        self._folder = pathlib.Path(folder)

    def entries(self) -> tuple[str, dict[str, tuple[int, str]]]:
        """Return the folder, and the newest epoch and endpoint of each shard by its name."""
        directory = ShardDirectory(self._folder)
        try:
            shards = directory.shards()
        except UnavailableError:
            shards = []
        return str(self._folder), {shard: directory.newest(shard) for shard in shards}
