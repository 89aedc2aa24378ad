"""From a target, or several, to a client."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

from stepwire.client import Client
from stepwire.connection.channel import Calls, checked_timeout
from stepwire.connection.config_file import ConfigFile, asked_target, read_config_file
from stepwire.connection.errands import by_errand, undelivered
from stepwire.connection.places import Asking, Place, places_of
from stepwire.connection.retry import Retry
from stepwire.connection.security import TLS, Security, security_of
from stepwire.errors import InvalidRequestError
from stepwire.links.server import RemoteServer
from stepwire.optimizers.arguments import checked_names
from stepwire.optimizers.hyperparameters import whole_number
from stepwire.sharding.move import Move
from stepwire.sharding.one_server import OneServer
from stepwire.sharding.server import ShardedServer
from stepwire.steps.trace import tracing_of
from stepwire.transports.available import asked_transport
from stepwire.transports.spin import spin_microseconds

__all__ = ["calls_to", "connect", "count_servers", "move_session"]


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
            which step it together. A model that is too small to be cut lies on the first ones. Three kinds of target
            stand for shards, which the client follows wherever they move: `directory:/path`, a folder in which servers
            announce themselves (`stepwire serve --directory`); `dns:///name:port`, a name with several addresses, whose
            servers tell their shards (`stepwire serve --shard`); and `ray://auto`, or `ray://host:10001`, a Ray cluster
            (`stepwire cluster up`, extra `ray`). The names of shards give their order. `?shards=N` at the end waits
            until there are so many, and `/SHARD` is one of them. None: that of STEPWIRE_TARGET, else of the config
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
        UnavailableError: the directory names no shard yet; or a name, or a Ray cluster, tells no shards within the
            timeout.
        UnsupportedFeatureError: traces are asked for, and OpenTelemetry is not installed; or Ray is not.
    """
    file = read_config_file()
    targets, each_times = _targets(asked_target(None, file) if target is None else target), _checked(channels)
    asked = asked_transport(transport, file=file)
    spin_microseconds()  # a wrong one is refused here, and not by the first lane
    if whole_number(window_bytes, "window_bytes") < 0:
        raise InvalidRequestError.of("window_bytes", f"{window_bytes!r} is negative")
    tracing = tracing_of(trace_one_in, ",".join(targets))
    asking = Asking(_security(targets, tls, token, file), retry or Retry(), checked_timeout(timeout))
    places = [place for each in targets for place in places_of(each, asking) for _ in range(each_times)]

    def opened(place: Place) -> RemoteServer:
        return RemoteServer(_calls(place, asking), asked, window_bytes=window_bytes)

    servers = [opened(place) for place in places]
    followed = functools.partial(_opened_at, asking, opened)
    one = len(servers) == 1
    server = OneServer(servers[0], followed) if one else ShardedServer(servers, followed)
    client = Client(server, tracing)
    undelivered(client.close)
    return client


@by_errand
def move_session(
    session_id: str | Sequence[str],
    target: str | Sequence[str],
    onto: str | Sequence[str],
    *,
    timeout: float = 600.0,
    tls: bool | TLS | None = None,
    token: str | None = None,
) -> str:
    """Move a session to other servers, in any number of them, at the end of a step.

    Its client follows by itself, and sees one slow step. The bits of all steps are those of a session that has not
    moved. Before the end of the move the session stays where it is, whatever fails; a move that broke off is made
    again, or completed, by the same call. A session that an earlier move has brought to these servers stays there.

    Args:
        session_id: the session's id; with shards `Session.session_id`, or the ids in it. A former id is one too.
        target: the servers that have it, or those of the former id; see `connect`. The first one may name them all as
            a directory does.
        onto: the servers that are to have it, in the order of its new shards, as its clients name them. A server may
            be among both.
        timeout: seconds for everything.
        tls: as for `connect`, for all servers.
        token: as for `connect`, for all servers.

    Returns:
        The session's id from now on. The former one finds the session as long as its servers are there.

    Raises:
        InvalidRequestError: a target is none, or these are not the shards of one model.
        UnsupportedFeatureError: the session has rows that are named by ids, or durability
            `"replicated"`, or its servers have an object store.
        StepMismatchError: the shards are not at one step, and their client does not finish it.
        SessionNotFoundError: there is no such session.
        UnavailableError: a server cannot be reached; the message says what is known of the session.
    """
    file, named = read_config_file(), [_targets(group) for group in (target, onto)]
    security = _security([each for group in named for each in group], tls, token, file)
    asking = Asking(security, Retry(), checked_timeout(timeout))
    groups = [[place for each in group for place in places_of(each, asking)] for group in named]

    def opened(place: Place) -> RemoteServer:
        return RemoteServer(_calls(place, asking))

    with contextlib.ExitStack() as stack:
        sources, targets = ([opened(place) for place in group] for group in groups)
        here = ShardedServer(sources, functools.partial(_opened_at, asking, opened))
        for server in (here, *targets):
            stack.callback(server.close)
        ids = [session_id] if isinstance(session_id, str) else checked_names(session_id, "session_id")
        return Move(here, targets).make(",".join(ids), sources[0].calls.deadline(timeout))


def calls_to(target: str, *, timeout: float) -> Calls:
    """Open the calls of one server, protected as `connect` does without `tls` and `token`.

    Raises:
        InvalidRequestError: as `connect`, or the target has several shards.
        UnavailableError: as `connect`.
    """
    asking = _asking(target, timeout)
    places = places_of(target, asking)
    if len(places) > 1:
        raise InvalidRequestError.of(
            "target",
            f"{target!r} has {len(places)} shards, and the call is one server's; name the address of a shard, such as "
            f"that of the first, {places[0].address(timeout)!r}",
        )
    return _calls(places[0], asking)


def count_servers(target: str, *, timeout: float = 60.0) -> int:
    """Return the number of servers that `connect` opens channels to for a target.

    Raises:
        StepwireError: as `connect`.
    """
    return len(places_of(target, _asking(target, timeout)))


def _asking(target: str, timeout: float) -> Asking:
    return Asking(_security([target], None, None, read_config_file()), Retry(), checked_timeout(timeout))


def _opened_at(asking: Asking, opened: Callable[[Place], RemoteServer], target: str) -> RemoteServer:
    """Open the link to a server that a session has moved to."""
    return opened(places_of(target, asking)[0])


def _calls(place: Place, asking: Asking) -> Calls:
    return Calls(
        place.target,
        timeout_seconds=asking.timeout_seconds,
        retry=asking.retry,
        security=place.security,
        locate=place.locate,
    )


def _security(targets: Sequence[str], tls: bool | TLS | None, token: str | None, file: ConfigFile) -> Security:
    """Return the protection of connections; that of the config file is for its own target."""
    return security_of(tls, token, file=file if file.protects(targets) else ConfigFile())


def _targets(target: str | Sequence[str]) -> list[str]:
    targets = [target] if isinstance(target, str) or not isinstance(target, Sequence) else list(target)
    if not targets or not all(isinstance(each, str) for each in targets):
        raise InvalidRequestError.of("target", f"{target!r:.80} is neither a target nor a list of targets")
    return targets


def _checked(channels: int) -> int:
    if (count := whole_number(channels, "channels")) < 1:
        raise InvalidRequestError.of("channels", f"{channels!r} is not a positive integer")
    return count
