"""The records of a standby that comes, and the ids of the two sides."""

from __future__ import annotations

import secrets
from typing import Final, NamedTuple

from stepwire.errors import Reason, UnavailableError, UnsupportedFeatureError

__all__ = ["Joining", "Opened", "leads_already", "new_id", "no_replication", "no_standby"]

_RETRY_SECONDS: Final = 0.2


class Joining(NamedTuple):
    """A standby that comes, or comes back.

    Attributes:
        standby_id: the id of its process.
        primary_id: the primary whose records it has; empty for none.
        received: the last record that it has.
        promoted_epoch: the epoch in which it was promoted; 0 for a standby.
        shard: the name of its shard; empty for none.
    """

    standby_id: str
    primary_id: str = ""
    received: int = 0
    promoted_epoch: int = 0
    shard: str = ""


class Opened(NamedTuple):
    """The beginning of what a standby gets.

    Attributes:
        reader: the number of the stream.
        after: the number of the last record that it does not get.
        whole: all sessions follow whole.
    """

    reader: int
    after: int
    whole: bool


def new_id() -> str:
    """Return a random id of a process: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def no_replication(what: str) -> UnsupportedFeatureError:
    """Say that a server takes no part in replication."""
    return UnsupportedFeatureError(
        f"this server {what}; start it with --standby required, or --standby-of HOST:PORT",
        metadata={"feature": "durability_replicated"},
    )


def leads_already() -> UnsupportedFeatureError:
    """Say that a server cannot be promoted, since it is the primary."""
    return UnsupportedFeatureError(
        "this server is no standby, but the primary; name its standby, if that is to take its place",
        metadata={"feature": "durability_replicated"},
    )


def no_standby(why: str) -> UnavailableError:
    """Say that no standby confirms a session."""
    return UnavailableError(
        f"the session is replicated, and {why}; nothing is acknowledged that a standby has not, so try again, or "
        "attach to the promoted standby",
        reason=Reason.NO_STANDBY,
        retry_after_seconds=_RETRY_SECONDS,
    )
