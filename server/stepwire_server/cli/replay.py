"""The command `stepwire replay`."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

import stepwire
from stepwire_server.cli.data_directories import DataDir, SessionId, data_folder, telling_of_the_disk
from stepwire_server.cli.options import Json

if TYPE_CHECKING:
    from stepwire_server.records.step_result import StepResult

__all__ = ["replay"]

_COLUMNS: Final = ("step", "grad_norm", "update_norm", "param_norm", "lr", "skipped")


def replay(
    session_id: SessionId,
    data_dir: DataDir,
    checkpoint: Annotated[
        str,
        typer.Option("--from", metavar="<name>", help="The checkpoint to begin with; by default the oldest possible."),
    ] = "",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="<name>=<value>", help="A hyper-parameter in the place of every step's own."),
    ] = None,
    out: Annotated[str, typer.Option(metavar="<file>", help="A new CSV file for the curve.")] = "",
    as_json: Json = False,
) -> None:
    """Make the journal of a session again on the CPU, and print its curve: norms, learning rate, skipped steps.

    Nothing is written into the data directory, and no server is disturbed that uses it. With --set the same gradients
    meet other hyper-parameters.
    """
    from stepwire_server.devices.pool import DevicePool  # engines, which the other commands need not load
    from stepwire_server.engines import choose_engines
    from stepwire_server.rpc.durable_codec import DurableCodec
    from stepwire_server.sessions.replay import Replayer

    asked = dict(_change(text) for text in changes or [])
    if out and pathlib.Path(out).exists():
        raise stepwire.InvalidRequestError.of("out", f"{out} exists; name a file that does not")
    with telling_of_the_disk():
        folder = data_folder(data_dir, "log").parent
        with contextlib.closing(DevicePool.of(choose_engines("cpu").engines)) as pool:
            results = Replayer(folder, DurableCodec(), pool).replay(session_id, checkpoint, asked)
        rows = [_row(result) for result in results]
        if out:
            with pathlib.Path(out).open("x", encoding="utf-8", newline="") as file:
                file.write(_table(rows))
    if as_json:
        print(json.dumps([{name: _finite(value) for name, value in row.items()} for row in rows], allow_nan=False))
    elif out:
        print(f"wrote {len(rows)} steps to {out}")
    else:
        print(_table(rows), end="")


def _change(text: str) -> tuple[str, Any]:
    """Read a hyper-parameter, such as `lr=0.1` or `betas=[0.9, 0.99]`."""
    name, equals, value = text.partition("=")
    try:
        read = json.loads(value)
    except ValueError:
        read = None
    if not (name and equals) or read is None:
        raise stepwire.InvalidRequestError.of("set", f"{text!r:.80} is no number such as lr=0.001")
    return name.strip(), tuple(read) if isinstance(read, list) else read


def _row(result: StepResult) -> dict[str, Any]:
    """Return a step of the curve; the learning rates of groups behind the first have columns of their own."""
    rates = [group.hyperparameters.lr for group in result.groups]
    norms = (result.grad_norm, result.update_norm, result.param_norm)
    return {
        **dict(zip(_COLUMNS, (result.step, *norms, rates[0], result.skipped), strict=True)),
        **{f"lr{index}": rate for index, rate in enumerate(rates) if index},
    }


def _finite(value: Any) -> Any:
    """Return a number that JSON has; None for NaN and infinities, such as the norms of a gradient that was skipped."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
