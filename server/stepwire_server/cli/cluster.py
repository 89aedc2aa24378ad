"""The commands `stepwire cluster …`: shards on Ray, and sessions that move to other servers."""

from __future__ import annotations

import json
import pathlib
import signal
import threading
from typing import TYPE_CHECKING, Annotated

import typer

import stepwire
from stepwire.errors import InvalidRequestError
from stepwire_server.cli.options import Json
from stepwire_server.cli.scaling import Scaling
from stepwire_server.cluster.cluster_settings import ClusterSettings, Resources, ShardStatus, shard_names
from stepwire_server.config import load_config, named_bind

if TYPE_CHECKING:
    from stepwire_server.cluster.on_ray import RayCluster

__all__ = ["cluster_app"]

cluster_app = typer.Typer(
    name="cluster", help="Start, watch and end shards on a Ray cluster.", no_args_is_help=True, rich_markup_mode=None
)

Address = Annotated[
    str,
    typer.Option(help="The address of the Ray cluster, such as 10.0.0.1:6379, or auto. Empty: one on this machine."),
]


@cluster_app.command()
def up(
    folder: Annotated[
        pathlib.Path, typer.Argument(help="The folder that all machines see: the directory and the data.")
    ],
    shards: Annotated[int, typer.Option(help="The number of shards.")] = 1,
    cpus: Annotated[float, typer.Option(help="The processors of a shard, as Ray counts them.")] = 1.0,
    gpus: Annotated[float, typer.Option(help="The GPUs of a shard.")] = 0.0,
    standbys: Annotated[
        bool,
        typer.Option(
            "--standbys", help="Give each shard a second server in the place of a disk, for replicated sessions."
        ),
    ] = False,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Start the shards that are not there, and print them. Other settings come from STEPWIRE_ variables.

    Without an address the cluster is this machine's, and the command goes on until SIGTERM or Ctrl-C, which drain it.
    """
    settings = load_config({} if named_bind() else {"bind": "127.0.0.1:0"})  # a port for each shard
    asked = ClusterSettings(
        folder.absolute(), shards, settings, Resources(cpus, gpus, settings.memory_budget), standbys
    )
    with _joined(address) as cluster:
        _print(cluster.up(asked), as_json)
        if not address:
            _await_signal()
            cluster.drain()


@cluster_app.command()
def status(address: Address = "auto", as_json: Json = False) -> None:
    """Print the shards; exit code 1 if one does not answer."""
    with _joined(address, patience_seconds=10.0) as cluster:
        found = cluster.status()
        _print(found, as_json)
    raise typer.Exit(1 if any(each.problem for each in found) else 0)


@cluster_app.command()
def drain(
    shard: Annotated[list[str] | None, typer.Argument(help="The names of shards; all by default.")] = None,
    address: Address = "auto",
) -> None:
    """Drain shards and end them: steps finish, sessions are saved, and `up` starts them again.

    The exit code is 1 if one of them ended before everything was saved.
    """
    with _joined(address) as cluster:
        complete = cluster.drain(shard)
    for name, whole in complete.items():
        print(f"{name}: {'drained' if whole else 'ended before everything was saved'}")
    raise typer.Exit(0 if all(complete.values()) else 1)


@cluster_app.command()
def down(address: Address = "auto") -> None:
    """End all shards at once, without a drain; what is on their disks stays."""
    with _joined(address) as cluster:
        cluster.down()


@cluster_app.command()
def scale(
    folder: Annotated[pathlib.Path, typer.Argument(help="The folder of the cluster, as for `up`.")],
    shards: Annotated[int, typer.Option(help="The number of shards that there are to be.")],
    session: Annotated[
        list[str] | None, typer.Option(help="A session to move, by Session.session_id; give each one.")
    ] = None,
    cpus: Annotated[float, typer.Option(help="The processors of a new shard, as Ray counts them.")] = 1.0,
    gpus: Annotated[float, typer.Option(help="The GPUs of a new shard.")] = 0.0,
    address: Address = "auto",
) -> None:
    """Start or end shards, and move sessions onto those that there are to be. Prints the new id of each session.

    Clients see one slow step. A shard ends once no session is on it; sessions that are not named stay where they are.
    """
    settings = load_config({} if named_bind() else {"bind": "127.0.0.1:0"})
    asked = ClusterSettings(folder.absolute(), shards, settings, Resources(cpus, gpus, settings.memory_budget))
    with _joined(address) as cluster:
        former = cluster.names()
        surplus = cluster.grow(asked)
        for moved in Scaling(asked.directory).scale(session or [], former, shard_names(shards), surplus):
            print(moved, flush=True)
        complete = cluster.drain(surplus)
        Scaling(asked.directory).end(name for name, whole in complete.items() if whole)
    for name, whole in complete.items():
        print(f"{name}: {'ended' if whole else 'ended before everything was saved'}")
    raise typer.Exit(0 if all(complete.values()) else 1)


@cluster_app.command()
def move(
    session: Annotated[str, typer.Argument(help="The session, by Session.session_id.")],
    target: Annotated[list[str], typer.Option(help="A server that has the session, or a directory; give each one.")],
    onto: Annotated[
        list[str], typer.Option(help="A server that is to have it, as its clients name it; give each one, in order.")
    ],
    timeout: Annotated[float, typer.Option(help="The longest time of the move, in seconds.")] = 600.0,
) -> None:
    """Move a session onto other servers, whoever placed them, at the end of a step. Prints the new id.

    Its client sees one slow step. Whatever fails, the session is where it was or where it was to be; move it again.
    """
    print(stepwire.move_session(session, target, onto, timeout=timeout))


def _joined(address: str, patience_seconds: float = 120.0) -> RayCluster:
    """Join a Ray cluster; a server, and so gRPC, is loaded by this command alone."""
    from stepwire_server.cluster.on_ray import RayCluster

    return RayCluster(address, patience_seconds=patience_seconds)


def _print(found: list[ShardStatus], as_json: bool) -> None:
    if as_json:
        print(json.dumps([each._asdict() for each in found]), flush=True)
        return
    if not found:
        raise InvalidRequestError.of("address", "the Ray cluster has no shards; start some with `stepwire cluster up`")
    for each in found:
        state = each.problem or f"{each.endpoint}, epoch {each.epoch}, {each.sessions} sessions, process {each.pid}"
        role = "" if each.problem or each.role == "none" else f"{each.role}{' in sync' if each.in_sync else ''}, "
        print(f"{each.name}: {'draining, ' if each.draining else ''}{role}{state}", flush=True)


def _await_signal() -> None:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
