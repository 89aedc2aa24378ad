"""The shards of a cluster as plain data: their names, their settings, and the resources that each asks for."""

from __future__ import annotations

import pathlib
from typing import Final, NamedTuple

import msgspec

from stepwire.errors import InvalidRequestError
from stepwire_server.config import ServerConfig
from stepwire_server.processes.standby_settings import FROM_DIRECTORY

__all__ = ["ClusterSettings", "Resources", "ShardStatus", "shard_names", "standby_name"]

_MOST_SHARDS: Final = 4096
_PROMOTE_AFTER_SECONDS: Final = 10
_SHARD, _STANDBY = "shard-", "standby-"


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
    """The state of one server of a shard.

    Attributes:
        name: the name of its actor: the shard's, or that of the shard's second server.
        endpoint: its address for clients; empty while it does not answer.
        epoch: the epoch of its data directory; 0 while it does not answer.
        pid: the number of its process.
        sessions: the sessions in its memory.
        draining: it refuses new steps.
        role: "primary", "standby" or "deposed" in a shard of two servers; "none" otherwise.
        in_sync: the standby has all, and may be promoted.
        problem: the reason why it does not answer; empty for one that does.
    """

    name: str
    endpoint: str = ""
    epoch: int = 0
    pid: int = 0
    sessions: int = 0
    draining: bool = False
    role: str = "none"
    in_sync: bool = False
    problem: str = ""


class ClusterSettings(NamedTuple):
    """The servers of a cluster.

    Attributes:
        folder: the folder that all machines see: the directory and the data directories are below it.
        shards: the number of shards.
        server: the settings that all shards have in common.
        resources: the resources of each.
        standbys: each shard has two servers and no disk: a primary, and a standby that is promoted in its place.
    """

    folder: pathlib.Path
    shards: int
    server: ServerConfig
    resources: Resources = Resources()
    standbys: bool = False

    @property
    def directory(self) -> pathlib.Path:
        """The folder in which the shards announce themselves."""
        return self.folder / "directory"

    def server_of(self, name: str) -> ServerConfig:
        """Return the settings of a shard; its two servers have the same, and come in the role that is vacant."""
        announced = msgspec.structs.replace(self.server, directory=str(self.directory), shard=name)
        if not self.standbys:
            return msgspec.structs.replace(announced, data_dir=str(self.folder / "data" / name))
        return msgspec.structs.replace(
            announced,
            standby=self.server.standby or "required",
            standby_of=FROM_DIRECTORY,
            promote_after_seconds=self.server.promote_after_seconds or _PROMOTE_AFTER_SECONDS,
        )


def shard_names(shards: int) -> list[str]:
    """Return the names of so many shards; sorted, they are in their order.

    Raises:
        InvalidRequestError: the number is out of range.
    """
    if not 1 <= shards <= _MOST_SHARDS:
        raise InvalidRequestError.of("shards", f"{shards} is not in [1, {_MOST_SHARDS}]")
    return [f"{_SHARD}{index:04d}" for index in range(shards)]


def standby_name(shard: str) -> str:
    """Return the name of the second server of a shard."""
    return shard.replace(_SHARD, _STANDBY)
