"""The command `stepwire`: its subcommands, put together, and errors as exit codes."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

import stepwire
from stepwire_server.cli.bench import bench
from stepwire_server.cli.checkpoints import checkpoint_app
from stepwire_server.cli.cluster import cluster_app
from stepwire_server.cli.demo import demo
from stepwire_server.cli.doctor import diagnose
from stepwire_server.cli.health import health
from stepwire_server.cli.kernels import kernels
from stepwire_server.cli.options import Json
from stepwire_server.cli.replay import replay
from stepwire_server.cli.serve import serve
from stepwire_server.cli.sessions import sessions_app
from stepwire_server.cli.standby import standby_app
from stepwire_server.cli.state import state_app
from stepwire_server.cli.tokens import token_app
from stepwire_server.cli.top import top

__all__ = ["main"]

app = typer.Typer(
    name="stepwire",
    help="The optimizer as a service: stateful, exactly-once Adam steps over gRPC.",
    no_args_is_help=True,
    rich_markup_mode=None,  # in the frames of rich, names of variables are cut at 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command; an error of stepwire is one line on standard error and exit code 2."""
    _occupy_standard_streams()
    try:
        app(prog_name="stepwire")  # also for `python -m stepwire_server`
    except stepwire.StepwireError as error:
        print(f"stepwire: {error}", file=sys.stderr)
        sys.exit(2)


def _occupy_standard_streams() -> None:
    """Open those of the descriptors 0 to 2 that are closed: a socket of such a number would get lines of a log."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def version(as_json: Json = False) -> None:
    """Print the version."""
    print(json.dumps({"version": stepwire.__version__}) if as_json else f"stepwire {stepwire.__version__}")


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


app.command()(serve)
app.command()(demo)
app.command("doctor")(diagnose)
app.command()(health)
app.command()(bench)
app.command()(top)
app.add_typer(sessions_app)
app.add_typer(token_app)
app.add_typer(checkpoint_app)
app.add_typer(state_app)
app.add_typer(cluster_app)
app.add_typer(standby_app)
app.command()(replay)
app.command()(kernels)
app.command()(version)
