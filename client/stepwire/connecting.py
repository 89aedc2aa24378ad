"""From a target, or several, to a client."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stepwire.client import Client
from stepwire.connection.channel import Calls
from stepwire.connection.errands import by_errand, undelivered
from stepwire.connection.retry import Retry
from stepwire.connection.security import TLS, security_of
from stepwire.errors import InvalidRequestError
from stepwire.links.server import RemoteServer
from stepwire.optimizers.hyperparameters import whole_number
from stepwire.sharding.server import ShardedServer
from stepwire.transports.available import asked_transport
from stepwire.wire.directory import SCHEME, ShardDirectory

__all__ = ["connect"]


@by_errand
def connect(
    target: str | Sequence[str] = "localhost:50051",
    *,
    transport: str = "auto",
    channels: int = 1,
    timeout: float = 60.0,
    window_bytes: int = 0,
    tls: bool | TLS | None = None,
    token: str | None = None,
    retry: Retry | None = None,
) -> Client:
    """Open a client; it connects with its first call.

    Args:
        target: `host:port`, or `unix:/path`; or several of them: then each session is sharded over all these servers,
            which step it together. A model that is too small to be cut lies on the first ones. `directory:/path` names
            a folder in which servers announce themselves (`stepwire serve --directory`): the targets are its shards,
            and the client follows each of them wherever it moves.
        transport: the way of gradients and parameters: `"auto"`, the best that works (see `Session.transport`), or one
            alone: `"tcp"`, `"uds"` (a Unix socket), `"shm"` (memory shared on one host), `"cuda_ipc"` (memory shared on
            one GPU). The environment variable STEPWIRE_TRANSPORT replaces "auto".
        channels: connections to each target; with more than one, sessions are sharded over them as over several
            servers.
        timeout: default seconds of a call with all its repetitions.
        window_bytes: the most bytes of steps that a session with durability `"checkpoint"` keeps, on each server, to
            send them again by their numbers after a crash: about the bytes of the gradients since the last checkpoint.
            Where a lost step is not kept, `step` raises `StateLossError`.
        tls: encrypt the connection: True with the authorities that everybody trusts, or `TLS` with files. None: as the
            environment variables STEPWIRE_CA (a file, or "system"), STEPWIRE_CERT and STEPWIRE_CERT_KEY say.
        token: the token to show the server. None: that of STEPWIRE_TOKEN, or in the file that STEPWIRE_TOKEN_FILE
            names. A token never leaves in plaintext, but to this host.
        retry: the pauses between repetitions; tests pass their own clock.

    Raises:
        InvalidRequestError: the timeout or `channels` is not positive, `window_bytes` is negative, or there is no such
            target or transport, or the token would leave in plaintext.
        UnavailableError: the directory names no shard yet.
    """
    asked = asked_transport(transport)
    targets, each_times = _targets(target), _checked(channels)
    if whole_number(window_bytes, "window_bytes") < 0:
        raise InvalidRequestError.of("window_bytes", f"{window_bytes!r} is negative")
    places = [place for each in targets for place in _places(each) for _ in range(each_times)]
    security, retry = security_of(tls, token), retry or Retry()
    calls = [
        Calls(place.target, timeout_seconds=timeout, retry=retry, security=security, locate=place.locate)
        for place in places
    ]
    servers = [RemoteServer(each, asked, window_bytes=window_bytes) for each in calls]
    client = Client(servers[0] if len(servers) == 1 else ShardedServer(servers))
    undelivered(client.close)
    return client


class _Place(NamedTuple):
    """A server, and the way to its present address if it moves."""

    target: str
    locate: Callable[[], str] | None = None


def _targets(target: str | Sequence[str]) -> list[str]:
    targets = [target] if isinstance(target, str) or not isinstance(target, Sequence) else list(target)
    if not targets or not all(isinstance(each, str) for each in targets):
        raise InvalidRequestError.of("target", f"{target!r:.80} is neither a target nor a list of targets")
    return targets


def _checked(channels: int) -> int:
    if (count := whole_number(channels, "channels")) < 1:
        raise InvalidRequestError.of("channels", f"{channels!r} is not a positive integer")
    return count


def _places(target: str) -> list[_Place]:
    """Return the servers of a target: one, or those of all shards in a directory."""
    if not target.startswith(SCHEME):
        return [_Place(target)]
    folder = target.removeprefix(SCHEME)
    directory = ShardDirectory(pathlib.Path(folder.removeprefix("//") if folder.startswith("///") else folder))
    return [
        _Place(f"{target}/{shard}", lambda shard=shard: directory.newest(shard)[1])  # type: ignore[misc]
        for shard in directory.shards()
    ]
