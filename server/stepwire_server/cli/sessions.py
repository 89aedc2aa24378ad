"""The commands `stepwire sessions`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import stepwire
from stepwire.results import SessionInfo
from stepwire_server.cli.options import Json, Target, Timeout

__all__ = ["sessions_app"]

sessions_app = typer.Typer(name="sessions", help="List, show and close the sessions of a server.", no_args_is_help=True)


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
    """Close one session and free its memory; its state is lost."""
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
