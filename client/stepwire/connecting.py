"""From a target, or several, to a client."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stepwire.client import Client
from stepwire.connection.channel import Calls
from stepwire.connection.config_file import ConfigFile, asked_target, read_config_file
from stepwire.connection.errands import by_errand, undelivered
from stepwire.connection.retry import Retry
from stepwire.connection.security import TLS, Security, security_of
from stepwire.errors import InvalidRequestError
from stepwire.links.server import RemoteServer
from stepwire.optimizers.hyperparameters import whole_number
from stepwire.sharding.server import ShardedServer
from stepwire.steps.trace import tracing_of
from stepwire.transports.available import asked_transport
from stepwire.wire.directory import SCHEME, ShardDirectory

__all__ = ["Place", "calls_to", "connect", "places_of"]


@by_errand
def connect(
    target: str | Sequence[str] | None = None,
    *,
    transport: str = "auto",
    channels: int = 1,
    timeout: float = 60.0,
    window_bytes: int = 0,
    tls: bool | TLS | None = None,
    token: str | None = None,
    trace_one_in: int = 0,
    retry: Retry | None = None,
) -> Client:
    """Open a client; it connects with its first call.

    The config file is the one that STEPWIRE_CLIENT_CONFIG names, or `~/.config/stepwire/config.toml`. Its certificates
    and its token are for the target in it alone.

    Args:
        target: `host:port`, or `unix:/path`; or several of them: then each session is sharded over all these servers,
            which step it together. A model that is too small to be cut lies on the first ones. `directory:/path` names
            a folder in which servers announce themselves (`stepwire serve --directory`): the targets are its shards,
            and the client follows each of them wherever it moves. None: that of STEPWIRE_TARGET, else of the config
            file, else `localhost:50051`.
        transport: the way of gradients and parameters: `"auto"`, the best that works (see `Session.transport`), or one
            alone: `"tcp"`, `"uds"` (a Unix socket), `"shm"` (memory shared on one host), `"packets"` (that memory, and
            messages without gRPC), `"cuda_ipc"` (memory shared on one GPU). The environment variable
            STEPWIRE_TRANSPORT, or else the config file, replaces "auto".
        channels: connections to each target; with more than one, sessions are sharded over them as over several
            servers.
        timeout: default seconds of a call with all its repetitions.
        window_bytes: the most bytes of steps that a session with durability `"checkpoint"` keeps, on each server, to
            send them again by their numbers after a crash: about the bytes of the gradients since the last checkpoint.
            Where a lost step is not kept, `step` raises `StateLossError`.
        tls: encrypt the connection: True with the authorities that everybody trusts, or `TLS` with files. None: as the
            environment variables STEPWIRE_CA (a file, or "system"), STEPWIRE_CERT and STEPWIRE_CERT_KEY say, or else
            the config file.
        token: the token to show the server. None: that of STEPWIRE_TOKEN, or in the file that STEPWIRE_TOKEN_FILE
            names, or else the config file. A token never leaves in plaintext, but to this host.
        trace_one_in: trace one step in so many of each session, and steps that are slower than 99 % of those before,
            by OpenTelemetry (the extra `otel`); 0 for no traces. The variables OTEL_… choose the exporter.
        retry: the pauses between repetitions; tests pass their own clock.

    Raises:
        InvalidRequestError: the timeout or `channels` is not positive, `window_bytes` is negative, or there is no such
            target or transport, or the token would leave in plaintext, or the config file is wrong.
        UnavailableError: the directory names no shard yet.
        UnsupportedFeatureError: traces are asked for, and OpenTelemetry is not installed.
    """
    file = read_config_file()
    targets, each_times = _targets(asked_target(None, file) if target is None else target), _checked(channels)
    asked = asked_transport(transport, file=file)
    if whole_number(window_bytes, "window_bytes") < 0:
        raise InvalidRequestError.of("window_bytes", f"{window_bytes!r} is negative")
    tracing = tracing_of(trace_one_in, ",".join(targets))
    places = [place for each in targets for place in places_of(each) for _ in range(each_times)]
    security, retry = _security(targets, tls, token, file), retry or Retry()
    calls = [
        Calls(place.target, timeout_seconds=timeout, retry=retry, security=security, locate=place.locate)
        for place in places
    ]
    servers = [RemoteServer(each, asked, window_bytes=window_bytes) for each in calls]
    server = servers[0] if len(servers) == 1 else ShardedServer(servers)
    client = Client(server, tracing)
    undelivered(client.close)
    return client


def calls_to(target: str, *, timeout: float) -> Calls:
    """Open the calls of one server, protected as `connect` does without `tls` and `token`.

    Raises:
        InvalidRequestError: as `connect`, or the target is a directory of several shards.
        UnavailableError: the directory names no shard yet.
    """
    places = places_of(target)
    if len(places) > 1:
        raise InvalidRequestError.of(
            "target",
            f"{target!r} has {len(places)} shards, and the call is one server's; name the address of a shard, such as "
            f"that of the first, {places[0].address()!r}",
        )
    security = _security([target], None, None, read_config_file())
    (place,) = places
    return Calls(place.target, timeout_seconds=timeout, retry=Retry(), security=security, locate=place.locate)


def _security(targets: Sequence[str], tls: bool | TLS | None, token: str | None, file: ConfigFile) -> Security:
    """Return the protection of connections; that of the config file is for its own target."""
    return security_of(tls, token, file=file if file.protects(targets) else ConfigFile())


class Place(NamedTuple):
    """A server, and the way to its present address if it moves.

    Attributes:
        target: the server as the user named it, or as one shard of a directory.
        locate: returns the present address of a server that moves; None for one that stays at its target.
    """

    target: str
    locate: Callable[[], str] | None = None

    def address(self) -> str:
        """Return the present address.

        Raises:
            UnavailableError: nobody knows where the server is.
        """
        return self.target if self.locate is None else self.locate()


def _targets(target: str | Sequence[str]) -> list[str]:
    targets = [target] if isinstance(target, str) or not isinstance(target, Sequence) else list(target)
    if not targets or not all(isinstance(each, str) for each in targets):
        raise InvalidRequestError.of("target", f"{target!r:.80} is neither a target nor a list of targets")
    return targets


def _checked(channels: int) -> int:
    if (count := whole_number(channels, "channels")) < 1:
        raise InvalidRequestError.of("channels", f"{channels!r} is not a positive integer")
    return count


def places_of(target: str) -> list[Place]:
    """Return the servers of a target: one, or those of all shards in a directory.

    Raises:
        UnavailableError: the directory names no shard yet.
    """
    if not target.startswith(SCHEME):
        return [Place(target)]
    folder = target.removeprefix(SCHEME)
    directory = ShardDirectory(pathlib.Path(folder.removeprefix("//") if folder.startswith("///") else folder))
    return [
        Place(f"{target}/{shard}", lambda shard=shard: directory.newest(shard)[1])  # type: ignore[misc]
        for shard in directory.shards()
    ]
