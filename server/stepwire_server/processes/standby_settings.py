"""The settings of a primary and of a standby, as far as they ask something of each other."""

from __future__ import annotations

from typing import Final

from stepwire.errors import InvalidRequestError
from stepwire_server.config import ServerConfig

__all__ = ["FROM_DIRECTORY", "check_replication"]

FROM_DIRECTORY: Final = "directory"
"""The value of `standby_of` for a server that has whichever role of its shard is vacant."""


def check_replication(config: ServerConfig) -> None:
    """Refuse settings of replication that do not go together.

    Raises:
        InvalidRequestError: the message names the setting that is missing, or too much.
    """
    field = "standby_of" if config.standby_of else "standby"
    if not (config.standby or config.standby_of):
        for name in ("standby_token", "standby_ca", "promote_after_seconds"):
            if getattr(config, name):
                raise InvalidRequestError.of(name, "it is of a standby, which needs --standby-of; give it too")
        return
    if config.standby_of == FROM_DIRECTORY and not config.directory:
        raise InvalidRequestError.of(
            "standby_of", "the claims of a shard are in a directory; give --directory, --shard"
        )
    if config.data_dir:
        raise InvalidRequestError.of(
            field, "a server keeps its sessions on a disk or with a standby, not both; leave --data-dir out"
        )
    if config.processes > 1:
        raise InvalidRequestError.of(
            field, f"{config.processes} processes would need as many standbys; start a server for each"
        )
    if config.standby == "preferred" and not config.directory and not config.standby_of:
        raise InvalidRequestError.of(
            "standby", "to go on alone is a claim in the directory that the standby sees; give --directory and --shard"
        )
