"""The command `stepwire demo`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Annotated

import typer

from stepwire_server.cli.options import Json

__all__ = ["demo"]


def demo(
    steps: Annotated[int, typer.Option(help="The number of optimizer steps.")] = 1000,
    output: Annotated[pathlib.Path, typer.Option(help="The folder for the plot.")] = pathlib.Path("demo-output"),
    device: Annotated[
        str | None, typer.Option(help="The device of the server that the demo starts; auto by default.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="The address of a running server to train against, instead of a new one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a small network on handwritten digits against a server in another process."""
    from stepwire_server.demo import run_demo

    if device is not None and target is not None:
        raise typer.BadParameter("--device is of a server that is started; the server at --target has its own")
    report = run_demo(steps=steps, output=output, device=device or "auto", target=target, quiet=as_json)
    print(json.dumps(dataclasses.asdict(report)) if as_json else report.text())
