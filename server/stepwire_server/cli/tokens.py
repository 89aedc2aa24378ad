"""The commands `stepwire token`."""

from __future__ import annotations

import datetime
import json
import pathlib
import re
import time
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from stepwire.errors import InvalidRequestError
from stepwire_server.access.identity import Role
from stepwire_server.access.tokens import TokenRecord, digest_of, new_token, read_tokens, write_tokens
from stepwire_server.cli.options import Json

__all__ = ["token_app"]

token_app = typer.Typer(name="token", help="Make, list and revoke the tokens of a server.", no_args_is_help=True)

_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_File = Annotated[
    pathlib.Path, typer.Option("--file", "-f", envvar="STEPWIRE_TOKENS", help="The server's file of tokens.")
]


@token_app.command("create")
def create_token(
    name: str,
    file: _File,
    role: Annotated[Role, typer.Option(help="The rights: metrics, standby, reader, trainer or admin.")] = Role.TRAINER,
    tenant: Annotated[str, typer.Option(help="The tenant whose sessions it sees.")] = "",
    expires: Annotated[str, typer.Option(help="The time until its end, such as 12h or 90d; empty for none.")] = "",
) -> None:
    """Make a token, add its digest to the file, and print the token: it cannot be shown again."""
    records = read_tokens(file) if file.exists() else []
    if any(record.name == name for record in records):
        raise InvalidRequestError.of("name", f"the file has a token {name!r}; revoke it first, or use another name")
    token = new_token()
    fields = {"name": name, "digest": digest_of(token), "role": role, "tenant": tenant, "expires": _end(expires)}
    try:
        record = msgspec.convert(fields, TokenRecord)
    except msgspec.ValidationError:
        raise InvalidRequestError.of(
            "name", f"{name!r} and tenant {tenant!r} must be of at most 64 characters of [A-Za-z0-9._-]"
        ) from None
    write_tokens(file, [*records, record])
    print(token)


@token_app.command("list")
def list_tokens(file: _File, as_json: Json = False) -> None:
    """List the tokens of a file; the tokens themselves are not in it."""
    records = read_tokens(file)
    if as_json:
        print(json.dumps([msgspec.to_builtins(record) for record in records]))
        return
    table = Table("name", "role", "tenant", "expires")
    for record in records:
        table.add_row(record.name, record.role.value, record.tenant, _shown(record.expires))
    Console().print(table)


@token_app.command("revoke")
def revoke_token(name: str, file: _File) -> None:
    """Remove a token from the file: a running server reads it again, and ends the token's streams."""
    records = read_tokens(file)
    left = [record for record in records if record.name != name]
    if len(left) == len(records):
        raise InvalidRequestError.of("name", f"the file has no token {name!r}; see `stepwire token list`")
    write_tokens(file, left)


def _end(text: str) -> float | None:
    if not text:
        return None
    if (found := re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)) is None:
        raise InvalidRequestError.of("expires", f"{text!r} is no time such as 90s, 30m, 12h or 90d")
    return time.time() + int(found[1]) * _SECONDS[found[2]]


def _shown(expires: float | None) -> str:
    if expires is None:
        return "never"
    end = datetime.datetime.fromtimestamp(expires, datetime.UTC)
    return f"{end:%Y-%m-%d %H:%M:%S} UTC" + (" (over)" if expires <= time.time() else "")
