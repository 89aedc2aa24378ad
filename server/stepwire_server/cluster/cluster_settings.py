"""The shards of a cluster as plain data: their names, their settings, and the resources that each asks for."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import msgspec

from stepwire.errors import InvalidRequestError
from stepwire_server.config import ServerConfig

__all__ = ["ClusterSettings", "Resources", "ShardStatus", "shard_names"]

_MOST_SHARDS = 4096


class Resources(NamedTuple):
    """The resources of one shard, as Ray counts them.

    Attributes:
        cpus: processors.
        gpus: GPUs, a fraction included.
        memory_bytes: bytes of memory; 0 for none in particular.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0


class ShardStatus(NamedTuple):
    """The state of one shard.

    Attributes:
        name: its name.
        endpoint: its address for clients; empty while it does not answer.
        epoch: the epoch of its data directory; 0 while it does not answer.
        pid: the number of its process.
        sessions: the sessions in its memory.
        draining: it refuses new steps.
        problem: the reason why it does not answer; empty for one that does.
    """

    name: str
    endpoint: str = ""
    epoch: int = 0
    pid: int = 0
    sessions: int = 0
    draining: bool = False
    problem: str = ""


class ClusterSettings(NamedTuple):
    """The servers of a cluster.

    Attributes:
        folder: the folder that all machines see: the directory and the data directories are below it.
        shards: the number of shards.
        server: the settings that all shards have in common.
        resources: the resources of each.
    """

    folder: pathlib.Path
    shards: int
    server: ServerConfig
    resources: Resources = Resources()

    @property
    def directory(self) -> pathlib.Path:
        """The folder in which the shards announce themselves."""
        return self.folder / "directory"

    def server_of(self, name: str) -> ServerConfig:
        """Return the settings of a shard."""
        return msgspec.structs.replace(
            self.server,
            data_dir=str(self.folder / "data" / name),
            directory=str(self.directory),
            shard=name,
        )


def shard_names(shards: int) -> list[str]:
    """Return the names of so many shards; sorted, they are in their order.

    Raises:
        InvalidRequestError: the number is out of range.
    """
    if not 1 <= shards <= _MOST_SHARDS:
        raise InvalidRequestError.of("shards", f"{shards} is not in [1, {_MOST_SHARDS}]")
    return [f"shard-{index:04d}" for index in range(shards)]
