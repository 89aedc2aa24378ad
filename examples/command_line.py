"""The command line of all examples, their server, and their progress bar."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stepwire_server.processes.spawn import server_process

__all__ = ["a_server", "command_line", "progress_bar"]


def command_line(
    description: str | None,
    *,
    steps: int,
    quick_steps: int,
    plot: str,
    least_steps: int = 1,
    also: argparse.ArgumentParser | None = None,
) -> argparse.Namespace:
    """Return the parsed flags, with those of `also`, and with defaults for `steps` and `plot` (empty for none)."""
    form, parents = argparse.RawDescriptionHelpFormatter, [] if also is None else [also]
    parser = argparse.ArgumentParser(description=description, formatter_class=form, parents=parents)
    parser.add_argument("--target", help="a running server, host:port; default: a server of the program's own")
    parser.add_argument("--steps", type=int, help=f"optimizer steps of each run; default {steps}")
    parser.add_argument(
        "--quick", action="store_true", help=f"the short form that CI runs: {quick_steps} steps, no plot"
    )
    parser.add_argument("--plot", help=f"the file of the plot; default {plot}, with --quick none")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args()
    if options.steps is None:
        options.steps = quick_steps if options.quick else steps
    if options.steps < least_steps:
        parser.error(f"--steps {options.steps}: at least {least_steps}")
    if options.plot is None:
        options.plot = "" if options.quick else plot
    return options


@contextlib.contextmanager
def a_server(target: str | None) -> Iterator[str]:
    """Yield the target of a running server, or of a new process that ends with the block."""
    if target is not None:
        yield target
        return
    with server_process() as server:
        yield server.target


def progress_bar(options: argparse.Namespace) -> Progress:
    """Return a bar on standard error, so that standard output is the result alone."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=sys.stderr), disable=options.json)
