"""The commands `stepwire sessions`, and the options of every command that asks a server."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import stepwire
from stepwire.results import SessionInfo
from stepwire.wire.addresses import unix_path

__all__ = ["Json", "Target", "Timeout", "own_target", "sessions_app"]

_DEFAULT_TARGET: Final = "localhost:50051"
_EVERY_ADDRESS: Final = ("0.0.0.0", "[::]")

sessions_app = typer.Typer(name="sessions", help="Look at a server's sessions and end them.", no_args_is_help=True)


def own_target(environ: Mapping[str, str] = os.environ) -> str:
    """Return where a server with the settings of this environment is reached from its own machine.

    So a container's health check asks the server beside it, whatever STEPWIRE_BIND says.
    """
    bind = environ.get("STEPWIRE_BIND", "")
    if unix_path(bind) is not None:
        return bind
    host, _, port = bind.rpartition(":")
    if not host or port == "0":
        return _DEFAULT_TARGET
    return f"localhost:{port}" if host in _EVERY_ADDRESS else bind


Target = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        envvar="STEPWIRE_TARGET",
        help="The server, host:port or unix:/path.",
        default_factory=own_target,
        show_default=f"the one of STEPWIRE_BIND, else {_DEFAULT_TARGET}",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait for the server.")]


@sessions_app.command("list")
def list_sessions(target: Target, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """List the sessions of a server."""
    with stepwire.connect(target, timeout=timeout) as client:
        sessions = list(client.sessions())
    if as_json:
        print(json.dumps([_plain(session) for session in sessions]))
        return
    table = Table("session", "label", "step", "durable", "memory", "device", "attached", "expires")
    for session in sessions:
        table.add_row(
            session.session_id,
            Text(session.label),  # never markup
            str(session.applied_step),
            str(session.durable_step),
            f"{session.memory_bytes / 2**20:.1f} MiB",
            session.device,
            "yes" if session.attached else "no",
            f"{session.expire_time:%Y-%m-%d %H:%M:%S} UTC",
        )
    Console().print(table)


@sessions_app.command("show")
def show_session(session_id: str, target: Target, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """Show one session."""
    with stepwire.connect(target, timeout=timeout) as client:
        session = client.session(session_id)
        plain = _plain(session.info()) | {"tensors": {name: list(shape) for name, shape in session.shapes.items()}}
    if as_json:
        print(json.dumps(plain))
        return
    for name, value in plain.items():
        print(f"{name:>14}  {value}")


@sessions_app.command("close")
def close_session(session_id: str, target: Target, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """End one session and free its memory; its state is lost."""
    with stepwire.connect(target, timeout=timeout) as client:
        session = client.session(session_id)
        step = session.applied_step
        session.close()
    print(
        json.dumps({"session_id": session_id, "applied_step": step})
        if as_json
        else f"closed {session_id} at step {step}"
    )


def _plain(session: SessionInfo) -> dict[str, Any]:
    values = dataclasses.asdict(session)
    for name in ("create_time", "expire_time"):
        values[name] = values[name].isoformat()
    return values
