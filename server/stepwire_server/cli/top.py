"""The command `stepwire top`: the sessions of a server, live."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fnmatch
import importlib.util
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Final, NamedTuple

import typer

import stepwire
from stepwire.statistics import ServerLoad, SessionProgress, Statistics
from stepwire_server.cli.options import Json, Target, Timeout

__all__ = ["Order", "Row", "drawn", "heading", "plain", "rows", "snapshots", "top"]


class Order(enum.StrEnum):
    """A column that rows are sorted by, the largest first; labels and ids ascend."""

    RATE = "rate"
    STEP = "step"
    LAG = "lag"
    NORM = "norm"
    MEMORY = "memory"
    IDLE = "idle"
    LABEL = "label"
    ID = "id"


_COLUMNS: Final = (
    *("session", "label", "state", "step", "lag", "step/s", "grad norm", "update/param", "lr", "memory"),
    *("workers", "via", "idle"),
)
_ID_CHARACTERS: Final = 8
_LABEL_CHARACTERS: Final = 32
_KIB: Final = 1024


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        cells: the texts, in the order of the columns.
        alarming: the session is damaged, or its last gradient had NaN or Inf.
    """

    cells: tuple[str, ...]
    alarming: bool


def top(
    target: Target,
    interval: Annotated[float, typer.Option(help="The time between two snapshots, in seconds.")] = 1.0,
    sort: Annotated[Order, typer.Option(help="The column to sort by.")] = Order.RATE,
    chosen: Annotated[
        str,
        typer.Option(
            "--filter",
            metavar="<text>",
            help="Show sessions whose label has this text, or whose id begins so; * stands for any characters.",
        ),
    ] = "",
    count: Annotated[int, typer.Option(min=0, help="The number of snapshots; 0 goes on until Ctrl-C.")] = 0,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Show the sessions of a server, live: their speed, norms, memory and workers.

    With --json, or where standard output is no terminal, each snapshot is printed below the one before. A server that
    is lost on the way is asked again until it is back.
    """
    with (
        contextlib.suppress(KeyboardInterrupt),
        _quiet_end(),
        stepwire.connect(target, timeout=timeout) as client,
        _screen(as_json) as show,
    ):
        found = snapshots(client, interval, timeout)
        for statistics in itertools.islice(found, count or None):
            show(_selected(statistics, sort, chosen))


def heading(server: ServerLoad) -> str:
    """Describe a server in one line."""
    rate = "" if server.steps_per_second is None else f", {_number(server.steps_per_second)} step/s"
    parked = f" and {server.parked} parked" if server.parked else ""
    devices = ", ".join(
        f"{name} {_size(server.reserved_bytes[name])} of {_size(budget)}"
        for name, budget in server.budget_bytes.items()
    )
    state = "draining" if server.draining else f"up {_duration(server.uptime_seconds)}"
    return f"{server.target}: {state}, {server.sessions} sessions{parked}, {server.streams} streams{rate}, {devices}"


def rows(sessions: Sequence[SessionProgress]) -> list[Row]:
    """Return the lines of the table."""
    return [_row(session) for session in sessions]


def _row(session: SessionProgress) -> Row:
    result = session.last_result
    rates = [] if result is None else [group.hyperparameters.lr for group in result.groups]
    lag = None if session.durable_step is None else session.applied_step - session.durable_step
    cells = (
        session.session_id[:_ID_CHARACTERS],
        _shortened(session.label),
        session.activity,
        str(session.applied_step),
        "" if lag is None else str(lag),
        "" if session.steps_per_second is None else _number(session.steps_per_second),
        "" if result is None else _number(result.grad_norm),
        _number(ratio) if (ratio := _update_ratio(session)) is not None else "",
        "…".join(dict.fromkeys(f"{rate:.3g}" for rate in ([min(rates), max(rates)] if rates else []))),
        _size(session.memory_bytes),
        f"{session.attached_workers}/{session.workers}",
        ",".join(session.transports),
        _duration(session.idle_seconds) if session.idle_seconds >= 1.0 else "",
    )
    return Row(cells, session.activity == "damaged" or (result is not None and result.non_finite_count > 0))


def _update_ratio(session: SessionProgress) -> float | None:
    """Return the norm of the last update by that of the parameters; None without a measurement."""
    result = session.last_result
    if result is None or result.update_norm is None or not result.param_norm:
        return None
    return result.update_norm / result.param_norm


def _selected(statistics: Statistics, order: Order, text: str) -> Statistics:
    found = [session for session in statistics.sessions if _matches(session, text)]
    descends = order not in (Order.LABEL, Order.ID)
    found.sort(key=lambda session: _KEYS[order](session), reverse=descends)
    return dataclasses.replace(statistics, sessions=tuple(found))


def _matches(session: SessionProgress, text: str) -> bool:
    return session.session_id.startswith(text) or fnmatch.fnmatchcase(session.label, f"*{text}*")


_KEYS: Final[dict[Order, Callable[[SessionProgress], Any]]] = {
    Order.RATE: lambda session: session.steps_per_second or 0.0,
    Order.STEP: lambda session: session.applied_step,
    Order.LAG: lambda session: 0 if session.durable_step is None else session.applied_step - session.durable_step,
    Order.NORM: lambda session: _rank(None if session.last_result is None else session.last_result.grad_norm),
    Order.MEMORY: lambda session: session.memory_bytes,
    Order.IDLE: lambda session: session.idle_seconds,
    Order.LABEL: lambda session: session.label,
    Order.ID: lambda session: session.session_id,
}


def _rank(norm: float | None) -> float:
    """Return a number that sorts NaN first, and nothing last."""
    if norm is None:
        return -1.0
    return math.inf if math.isnan(norm) else norm


def snapshots(client: stepwire.Client, interval: float, timeout: float) -> Iterator[Statistics]:
    """Yield snapshots for ever, from a server that may be started again in between.

    Raises:
        StepwireError: the first one cannot be had, or the server refuses.
    """
    begun = False
    while True:
        try:
            for statistics in client.statistics(interval=interval, timeout=timeout):
                begun = True
                yield statistics
        except stepwire.UnavailableError as error:
            if not begun:
                raise
            print(f"stepwire: {error}; asking again", file=sys.stderr)
            time.sleep(interval)


@contextlib.contextmanager
def _screen(as_json: bool) -> Iterator[Callable[[Statistics], None]]:
    """Yield a function that shows a snapshot: live on a terminal, else below the one before."""
    if as_json:
        yield _print_json
    elif sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        with _live() as show:
            yield show
    else:
        yield _print_lines


@contextlib.contextmanager
def _live() -> Iterator[Callable[[Statistics], None]]:
    from rich.console import Console
    from rich.live import Live

    console = Console()  # of the terminal as it is now: that of the whole process keeps its first width
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda statistics: live.update(drawn(statistics), refresh=True)


def drawn(statistics: Statistics) -> Any:
    """Return a snapshot as rich draws it."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, expand=True)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("session", "label", "state", "via") else "right")
    for row in rows(statistics.sessions):  # texts, never markup
        table.add_row(*map(Text, row.cells), style="bold red" if row.alarming else None)
    return Group(*(Text(heading(server), style="bold") for server in statistics.servers), table)


def _print_lines(statistics: Statistics) -> None:
    table = [_COLUMNS, *(row.cells for row in rows(statistics.sessions))]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [heading(server) for server in statistics.servers]
    lines += ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    print("\n".join(lines), end="\n\n", flush=True)


def _print_json(statistics: Statistics) -> None:
    print(json.dumps(plain(statistics)), flush=True)


@contextlib.contextmanager
def _quiet_end() -> Iterator[None]:
    """End quietly when whoever reads the output has enough of it."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain(value: Any) -> Any:
    """Return a value in JSON's terms, which have neither NaN nor infinity: null stands for both."""
    if isinstance(value, Statistics):
        return plain(dataclasses.asdict(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def _shortened(label: str) -> str:
    """Return a label without the characters that could move a terminal's cursor."""
    shown = "".join(character if character.isprintable() else "�" for character in label)
    return shown if len(shown) <= _LABEL_CHARACTERS else f"{shown[: _LABEL_CHARACTERS - 1]}…"


def _number(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _size(count_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count_bytes < _KIB:
            return f"{count_bytes:.3g} {unit}"
        count_bytes /= _KIB
    return f"{count_bytes:.4g} TiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
