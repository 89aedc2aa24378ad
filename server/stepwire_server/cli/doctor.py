"""The command `stepwire doctor`."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated, Any

import typer

from stepwire_server.cli.options import Json, Timeout, takes_settings
from stepwire_server.config import load_config
from stepwire_server.doctor import machine

__all__ = ["diagnose"]


@takes_settings("device", "bind", "data_dir", "checkpoint_store")
def diagnose(
    *,
    config: Annotated[
        pathlib.Path | None, typer.Option(help="The path of a TOML file of settings. Variable: STEPWIRE_CONFIG.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="The address of a running server whose transports are tried instead."),
    ] = None,
    timeout: Timeout = 10.0,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Check this machine for a server, and print a remedy for each problem.

    The exit code is 0 for a machine that can serve and 1 for one that cannot. Settings are read as `serve` reads them.
    With --target the command tries every transport to a running server from here.
    """
    if target is None:
        settings = load_config(flags, file=config)
        findings = machine.examine(settings.device, settings.bind, settings.data_dir, settings.checkpoint_store)
    else:
        from stepwire_server.doctor.target import examine_target

        findings = examine_target(target, timeout)
    healthy = machine.healthy(findings)
    if as_json:
        print(json.dumps({"healthy": healthy, "findings": [finding._asdict() for finding in findings]}))
    else:
        print(machine.report(findings))
    raise typer.Exit(0 if healthy else 1)
