"""The servers of a target: one, or those of all shards that a directory, a name or a Ray cluster tells of."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from stepwire.connection.channel import Calls
from stepwire.connection.named_servers import NamedServers
from stepwire.connection.ray_directory import RAY_SCHEME, RayDirectory
from stepwire.connection.retry import Deadline, Retry
from stepwire.connection.security import Security
from stepwire.connection.shard_endpoints import FolderEndpoints, LearntEndpoints, ShardEndpoints
from stepwire.errors import Reason, UnavailableError
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.addresses import named_host
from stepwire.wire.directory import SCHEME, ShardDirectory

__all__ = ["Asking", "Place", "places_of"]

_LEAST: Final = re.compile(r"\?shards=([0-9]{1,4})$")
_OF_ONE: Final = re.compile(rf"((?:dns:///|{RAY_SCHEME})[^/]+)/([^/]+)")


class Asking(NamedTuple):
    """The way in which servers are asked for their shards.

    Attributes:
        security: the protection of the connections.
        retry: the pauses between two looks.
        timeout_seconds: the longest wait for shards that are not there yet.
    """

    security: Security
    retry: Retry
    timeout_seconds: float


class Place(NamedTuple):
    """A server, and the way to its present address if it moves.

    Attributes:
        target: the server as the user named it, or as one shard of the target.
        security: the protection of its connection.
        locate: returns the present address of a server that moves, within some seconds; None for one that stays at its
            target.
    """

    target: str
    security: Security
    locate: Callable[[float], str] | None = None

    def address(self, seconds: float) -> str:
        """Return the present address.

        Raises:
            UnavailableError: nobody knows it.
        """
        return self.target if self.locate is None else self.locate(seconds)


def places_of(target: str, asking: Asking) -> list[Place]:
    """Return the servers of a target: one, or those of all shards.

    Args:
        target: as `stepwire.connect` has it; `?shards=N` at its end waits until so many shards are there. A target with
            `/SHARD` behind it, such as `Place.target`, is one of the shards.
        asking: the way of asking.

    Raises:
        InvalidRequestError: the servers of a name are no shards.
        UnavailableError: nobody tells of any shard, or of so many, within the timeout.
        UnsupportedFeatureError: the target is a Ray cluster, and Ray is not installed.
    """
    asked = _LEAST.search(target)
    least, plain = (int(asked[1]), target[: asked.start()]) if asked else (0, target)
    whole, shard = _parted(plain)
    named = named_host(whole)
    security = asking.security if named is None else asking.security._replace(server_name=named[0])
    known: ShardEndpoints
    if whole.startswith(SCHEME):
        known = FolderEndpoints(_directory(whole))
    elif whole.startswith(RAY_SCHEME):
        known = LearntEndpoints(RayDirectory(whole))
    elif named is not None:
        known = LearntEndpoints(
            NamedServers(*named, functools.partial(_asked, asking.retry, security), are_shards=bool(shard))
        )
    else:
        return [Place(target, asking.security)]
    if shard:
        return [Place(plain, security, functools.partial(known.endpoint, shard))]
    deadline = asking.retry.deadline(asking.timeout_seconds)
    look = functools.partial(_awaited, known, plain, least)
    waits = least > 0 or not isinstance(known, FolderEndpoints)  # a folder has what it has, and asks nobody
    shards = asking.retry.call(look, deadline) if waits else look(deadline)
    if not shards:
        return [Place(plain, asking.security)]
    return [Place(f"{plain}/{each}", security, functools.partial(known.endpoint, each)) for each in shards]


def _parted(target: str) -> tuple[str, str]:
    """Return a target of several shards, and the shard in it; empty for all of them."""
    folder, _, last = target.rpartition("/")
    if target.startswith(SCHEME):
        return (folder, last) if _directory(target).is_of_one_shard else (target, "")
    found = _OF_ONE.fullmatch(target)
    return (found[1], found[2]) if found else (target, "")


def _directory(target: str) -> ShardDirectory:
    folder = target.removeprefix(SCHEME)
    return ShardDirectory(pathlib.Path(folder.removeprefix("//") if folder.startswith("///") else folder))


def _awaited(known: ShardEndpoints, target: str, least: int, deadline: Deadline) -> list[str]:
    """Return the names of the shards, sorted.

    Raises:
        StepwireError: as `ShardEndpoints.shards`; or UnavailableError, too few are there so far.
    """
    found = known.shards(deadline.remaining())
    if len(found) < least:
        raise UnavailableError(
            f"{target!r} has {len(found)} shards so far, and {least} are asked for; start the others, or ask for fewer",
            reason=Reason.UNREACHABLE,
        )
    return found


def _asked(retry: Retry, security: Security, endpoint: str, seconds: float) -> pb.GetServerInfoResponse:
    """Ask one server for its properties.

    Raises:
        StepwireError: the server's refusal, or no connection.
    """
    calls = Calls(endpoint, timeout_seconds=seconds, retry=retry, security=security)
    try:
        response: pb.GetServerInfoResponse = calls.once(
            "GetServerInfo", pb.GetServerInfoRequest(), pb.GetServerInfoResponse, seconds
        )
        return response
    finally:
        calls.close()
