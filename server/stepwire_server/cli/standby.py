"""The commands `stepwire standby …`: how a primary and its standby stand, and the change between the two."""

from __future__ import annotations

import contextlib
import json
import pathlib
from typing import Annotated, Any, Final

import typer
from google.protobuf import json_format

from stepwire.errors import InvalidRequestError
from stepwire.v1 import replication_service_pb2 as pb
from stepwire_server.cli.options import Json, Target, Timeout
from stepwire_server.replication.claims import Claims

__all__ = ["standby_app"]

standby_app = typer.Typer(
    name="standby", help="Watch, promote and forget standbys.", no_args_is_help=True, rich_markup_mode=None
)

_SERVICE: Final = "/stepwire.v1.ReplicationService/"
_ROLES: Final = {
    pb.REPLICATION_ROLE_UNSPECIFIED: "no standby",
    pb.REPLICATION_ROLE_PRIMARY: "primary",
    pb.REPLICATION_ROLE_STANDBY: "standby",
    pb.REPLICATION_ROLE_DEPOSED: "deposed",
}


@standby_app.command()
def status(target: Target, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """Tell how replication stands on a server; exit code 1 if its standby may not be promoted just now."""
    found = _asked(target, "GetReplication", pb.GetReplicationRequest(), pb.GetReplicationResponse, timeout)
    if as_json:
        plain = json_format.MessageToDict(
            found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        print(json.dumps(plain | {"role": _ROLES[found.role]}))
    else:
        other = f"{found.peer_id or 'nobody'} ({'connected' if found.connected else 'not connected'})"
        print(f"{target}: {_ROLES[found.role]} of epoch {found.epoch}, beside {other}")
        print(f"records: {found.position}, acknowledged {found.acknowledged}")
        print(f"sessions: {found.sessions}, incomplete {found.incomplete}, diverged {found.divergences} times")
        print("in sync: the standby may be promoted" if found.in_sync else "not in sync")
        if found.problem:
            print(f"serves no sessions: {found.problem}")
    raise typer.Exit(0 if found.in_sync else 1)


@standby_app.command()
def promote(
    target: Target,
    lossy: Annotated[
        bool, typer.Option(help="Promote a standby that lacks acknowledged steps or sessions, which are lost then.")
    ] = False,
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Make a standby the primary. The old primary acknowledges nothing from then on, reachable or not."""
    done = _asked(target, "Promote", pb.PromoteRequest(lossy=lossy), pb.PromoteResponse, timeout)
    if as_json:
        print(json.dumps({"epoch": done.epoch, "sessions": done.sessions}))
    else:
        print(f"{target} is the primary of {done.sessions} sessions, in epoch {done.epoch}")


@standby_app.command()
def forget(target: Target, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """Have a primary accept another standby. The one that it knows must be gone for good."""
    done = _asked(target, "ForgetStandby", pb.ForgetStandbyRequest(), pb.ForgetStandbyResponse, timeout)
    if as_json:
        print(json.dumps({"standby_id": done.standby_id}))
    else:
        print(f"forgot {done.standby_id}" if done.standby_id else "no standby was known")


@standby_app.command()
def disown(
    directory: Annotated[pathlib.Path, typer.Argument(help="The folder of --directory.")],
    shard: Annotated[str, typer.Argument(help="The name of the shard.")],
    yes: Annotated[bool, typer.Option("--yes", help="Give up the replicated sessions of the shard.")] = False,
) -> None:
    """Give up the sessions of a shard, wherever they are, so that a server may begin it anew."""
    claims = Claims(directory, shard)
    newest = claims.newest()
    if not newest.server:
        print(f"nobody speaks for {shard}")
        return
    if not yes:
        raise InvalidRequestError.of(
            "yes", f"the sessions of {shard!r} are with the server at {newest.endpoint}; --yes gives them up for good"
        )
    claims.release(newest.epoch)
    print(f"gave up the sessions of {shard}, which the server at {newest.endpoint} had")


def _asked(target: str, method: str, request: Any, response: Any, timeout: float) -> Any:
    """Call a method once.

    Raises:
        StepwireError: the server's refusal, or no connection.
    """
    from stepwire.connecting import calls_to  # here, because a parent of several processes must not load gRPC

    with contextlib.closing(calls_to(target, timeout=timeout)) as calls, calls.translated():
        call: Any = calls.channel.unary_unary(
            _SERVICE + method, request_serializer=None, response_deserializer=response.FromString
        )
        return call(request.SerializeToString(), timeout=timeout, metadata=calls.metadata)
