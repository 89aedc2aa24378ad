"""The announcement of a server in the directory of shards, which tells clients where it is."""

from __future__ import annotations

import pathlib
import socket
from collections.abc import Mapping
from typing import Final

import structlog

from stepwire.errors import InvalidRequestError
from stepwire.wire.directory import ShardDirectory
from stepwire_server.config import ServerConfig

__all__ = ["announce", "check_announced", "endpoint_of"]

_log = structlog.get_logger()
_EVERY_ADDRESS: Final = ("0.0.0.0", "[::]")


def check_announced(config: ServerConfig) -> None:
    """Refuse settings of an announcement that do not go together.

    Raises:
        InvalidRequestError: the message names the setting that is missing, or too much.
    """
    if not config.directory:
        if config.advertise:
            raise InvalidRequestError.of("advertise", "it is of an announcement, which needs --directory; give it too")
        return
    if not config.shard:
        raise InvalidRequestError.of("directory", "an announcement needs --shard; give it too")
    if not (config.data_dir or config.standby or config.standby_of):
        raise InvalidRequestError.of("directory", "an announcement needs --data-dir, or --standby; give one too")


def endpoint_of(config: ServerConfig, target: str, port: int) -> str:
    """Return the address that clients on other machines use.

    Args:
        config: the settings.
        target: the server's own target.
        port: the port in use.
    """
    if config.advertise:
        host, _, named = config.advertise.rpartition(":")
        return f"{host}:{port if named == '0' else named}"
    host = target.rpartition(":")[0]
    return f"{socket.gethostname()}:{port}" if host in _EVERY_ADDRESS else target


def announce(config: ServerConfig, epoch: int, endpoint: str, durable_steps: Mapping[str, int]) -> None:
    """Announce a server that listens, if its settings name a directory.

    Args:
        config: the settings.
        epoch: the epoch from which on the server has its sessions.
        endpoint: its address for clients, as `endpoint_of` tells.
        durable_steps: as in `ShardEntry`.

    Raises:
        InvalidRequestError: the directory cannot be written, or another server has announced this epoch.
    """
    if not config.directory:
        return
    try:
        ShardDirectory(pathlib.Path(config.directory)).announce(config.shard, epoch, endpoint, durable_steps)
    except OSError as problem:
        raise InvalidRequestError.of(
            "directory", f"{config.directory!r} cannot be written: {problem.strerror}; name a folder of this user"
        ) from None
    _log.info("announced", directory=config.directory, shard=config.shard, epoch=epoch, endpoint=endpoint)
