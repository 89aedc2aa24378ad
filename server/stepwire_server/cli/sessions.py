"""The commands `stepwire sessions`."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import stepwire
from stepwire.results import SessionInfo
from stepwire_server.cli.options import Json, Target, Timeout
from stepwire_server.observability.digests import digest_in_logs

__all__ = ["sessions_app"]

sessions_app = typer.Typer(name="sessions", help="List, show and close the sessions of a server.", no_args_is_help=True)

_ID_LENGTH: Final = 32
_UNBOUNDED_WIDTH: Final = 10_000
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


@sessions_app.command("list")
def list_sessions(target: Target, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """List the sessions of a server."""
    with stepwire.connect(target, timeout=timeout) as client:
        sessions = list(client.sessions())
    if as_json:
        print(json.dumps([_plain(session) for session in sessions]))
        return
    table = Table(
        Column("session", no_wrap=True, min_width=_ID_LENGTH),  # whole, since other commands ask for it
        *("in logs", "label", "step", "durable", "memory", "device", "attached", "idle", "expires"),
    )
    for session in sessions:
        table.add_row(
            session.session_id,
            digest_in_logs(session.session_id),
            Text(session.label),  # never markup
            str(session.applied_step),
            str(session.durable_step or ""),  # most sessions are in memory alone
            f"{session.memory_bytes / 2**20:.1f} MiB",
            session.device,
            "parked" if session.parked else "yes" if session.attached else "no",
            "" if session.parked else f"{session.idle_seconds:.0f} s",
            "" if session.parked else f"{session.expire_time:%Y-%m-%d %H:%M:%S} UTC",
        )
    Console(width=None if sys.stdout.isatty() else _UNBOUNDED_WIDTH).print(table)


@sessions_app.command("show")
def show_session(
    session_id: Annotated[str, typer.Argument(metavar="ID", help="The id of a session, or its beginning.")],
    target: Target,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Show one session."""
    with stepwire.connect(target, timeout=timeout) as client:
        (found,) = _named(list(client.sessions()), [session_id])
        session = client.session(found.session_id)
        plain = _plain(session.info()) | {"tensors": {name: list(shape) for name, shape in session.shapes.items()}}
    if as_json:
        print(json.dumps(plain))
        return
    for name, value in plain.items():
        print(f"{name:>14}  {value}")


@sessions_app.command("digest")
def print_digest(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of sessions, or tokens.")],
) -> None:
    """Print the digests that log lines have in the place of ids and tokens; no server is asked."""
    for each in ids:
        print(digest_in_logs(each))


@sessions_app.command("close")
def close_sessions(
    target: Target,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of sessions, or beginnings of ids.")
    ] = None,
    idle: Annotated[
        str, typer.Option(metavar="<duration>", help="Close sessions idle for this long, such as 90s, 15m, 2h or 1d.")
    ] = "",
    label: Annotated[
        str, typer.Option(metavar="<text>", help="Close sessions with this label; * stands for any characters.")
    ] = "",
    everything: Annotated[bool, typer.Option("--all", help="Close all sessions, also those in use.")] = False,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Close sessions and free their memory; their state is lost.

    With several options, a session is closed that all of them name. A session is idle without a client and a call.
    """
    ids = ids or []
    if not (ids or idle or label or everything):
        raise stepwire.InvalidRequestError.of("ids", "name sessions by their ids, --idle, --label or --all")
    seconds = _duration(idle) if idle else 0.0
    with stepwire.connect(target, timeout=timeout) as client:
        for session in _named(list(client.sessions()), ids) if ids else client.sessions():
            if (idle and not session.idle_seconds >= max(seconds, 1e-9)) or not _has_label(session, label):
                continue
            with client.session(session.session_id) as found:
                closed = {"session_id": session.session_id, "applied_step": found.applied_step}
            print(json.dumps(closed) if as_json else f"closed {session.session_id} at step {closed['applied_step']}")


def _named(sessions: Sequence[SessionInfo], ids: Sequence[str]) -> Iterator[SessionInfo]:
    """Yield the sessions that ids, or beginnings of ids, name; each once.

    Raises:
        InvalidRequestError: a beginning is that of several ids.
        SessionNotFoundError: there is no such session.
    """
    found: dict[str, SessionInfo] = {}
    for beginning in ids:
        alike = [session for session in sessions if beginning and session.session_id.startswith(beginning)]
        if not alike:
            raise stepwire.SessionNotFoundError(f"session {beginning!r} does not exist here: no id begins so")
        if len(alike) > 1:
            several = ", ".join(session.session_id for session in alike)
            raise stepwire.InvalidRequestError.of("ids", f"{beginning!r} is the beginning of several: {several}")
        found[alike[0].session_id] = alike[0]
    yield from found.values()


def _has_label(session: SessionInfo, label: str) -> bool:
    return not label or session.label == label or fnmatch.fnmatchcase(session.label, label)


def _duration(text: str) -> float:
    """Read a time such as "90s", "15m" or "2h"; a number alone is of seconds.

    Raises:
        InvalidRequestError: the text is no time.
    """
    if (match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", text.strip())) is None:
        raise stepwire.InvalidRequestError.of("idle", f"{text!r} is no time such as 90s, 15m, 2h or 1d")
    return float(match[1]) * _SECONDS[match[2]]


def _plain(session: SessionInfo) -> dict[str, Any]:
    values = dataclasses.asdict(session) | {"digest_in_logs": digest_in_logs(session.session_id)}
    for name in ("create_time", "expire_time"):
        values[name] = values[name].isoformat()
    return values
