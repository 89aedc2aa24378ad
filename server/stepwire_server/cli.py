"""The command `stepwire`: flags in, exit codes out. What it does lives elsewhere."""

from __future__ import annotations

import dataclasses
import gc
import json
import pathlib
import signal
import sys
import threading
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import stepwire
from stepwire.results import SessionInfo
from stepwire_server import doctor, heap
from stepwire_server.app import Server
from stepwire_server.config import load_config
from stepwire_server.logs import configure_logging

__all__ = ["main"]

app = typer.Typer(
    name="stepwire",
    help="The optimizer as a service: stateful, exactly-once Adam steps over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
sessions_app = typer.Typer(name="sessions", help="Look at a server's sessions and end them.", no_args_is_help=True)
app.add_typer(sessions_app)

_Target = Annotated[
    str, typer.Option("--target", "-t", envvar="STEPWIRE_TARGET", help="The server, host:port.", show_default=True)
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
_Timeout = Annotated[float, typer.Option(help="Seconds to wait for the server.")]
_DEFAULT_TARGET = "localhost:50051"
_DEVICES = "auto, cpu, cuda (every GPU that works), cuda:N, or several: cuda:0,cuda:2."
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def main() -> None:
    """Run the command; errors of ours are one line on standard error and exit code 2."""
    try:
        app()
    except stepwire.StepwireError as error:
        print(f"stepwire: {error}", file=sys.stderr)
        sys.exit(2)


def parse_bytes(text: str) -> int:
    """Read a number of bytes such as "8G" or "512MiB".

    Raises:
        typer.BadParameter: it is not one.
    """
    digits = text.strip().upper().removesuffix("IB").removesuffix("B")
    factor = _SUFFIXES.get(digits[-1:], 1)
    number = digits[:-1] if factor > 1 else digits
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a number of bytes such as 8G or 512MiB") from None


@app.command()
def serve(
    bind: Annotated[str | None, typer.Option(help="Address, host:port; port 0 takes a free one.")] = None,
    device: Annotated[str | None, typer.Option(help=_DEVICES)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine; 0: one a core.")] = None,
    max_sessions: Annotated[int | None, typer.Option(help="Sessions at a time.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Bytes that sessions may hold on each device, such as 8G; 0: 80 % of its memory.")
    ] = None,
    max_streams: Annotated[int | None, typer.Option(help="Attached streams at a time.")] = None,
    max_lease_seconds: Annotated[float | None, typer.Option(help="Life of an unused session.")] = None,
    drain_seconds: Annotated[float | None, typer.Option(help="Time for steps under way after SIGTERM.")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Allow plaintext on an address that is not loopback.")
    ] = None,
    port_file: Annotated[str | None, typer.Option(help="Write the port here once listening.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json/--log-text", help="How log lines look.")] = None,
    config: Annotated[pathlib.Path | None, typer.Option(help="A TOML file of settings.")] = None,
) -> None:
    """Run a server until SIGTERM or SIGINT; steps under way finish, new ones are refused, exit code 0.

    Every setting is also an environment variable, STEPWIRE_<NAME>, and a key of the TOML file; flags win.
    """
    flags = dict(locals())
    del flags["config"], flags["memory_budget"]
    flags["memory_budget_bytes"] = None if memory_budget is None else parse_bytes(memory_budget)
    settings = load_config(flags, file=config)
    configure_logging(settings.log_level, settings.log_json)
    heap.configure()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Server(settings) as server:
        # What imports and start-up made lives as long as the process: keep the collector from walking it again and
        # again in the middle of steps.
        gc.collect()
        gc.freeze()
        stop.wait()
        if not server.drain():
            raise typer.Exit(1)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    output: Annotated[pathlib.Path, typer.Option(help="Folder for the plot.")] = pathlib.Path("demo-output"),
    device: Annotated[str, typer.Option(help="Device of the server.")] = "auto",
    as_json: _Json = False,
) -> None:
    """Train a small network on handwritten digits against a server in another process."""
    from stepwire_server.demo import run_demo

    report = run_demo(steps=steps, output=output, device=device, quiet=as_json)
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(report.text())


@app.command("doctor")
def diagnose(
    device: Annotated[str | None, typer.Option(help=f"What a server would be told: {_DEVICES}")] = None,
    bind: Annotated[str | None, typer.Option(help="Where it would listen, host:port.")] = None,
    config: Annotated[pathlib.Path | None, typer.Option(help="A TOML file of settings.")] = None,
    as_json: _Json = False,
) -> None:
    """Check this machine for a server: exit with 0 if it can serve, 1 if not; each problem with its remedy.

    Settings are read as `serve` reads them: flags, then STEPWIRE_<NAME>, then the file.
    """
    settings = load_config({"device": device, "bind": bind}, file=config)
    findings = doctor.examine(settings.device, settings.bind)
    healthy = doctor.healthy(findings)
    if as_json:
        print(json.dumps({"healthy": healthy, "findings": [finding._asdict() for finding in findings]}))
    else:
        print(doctor.report(findings))
    raise typer.Exit(0 if healthy else 1)


@app.command()
def health(target: _Target = _DEFAULT_TARGET, timeout: _Timeout = 5.0, as_json: _Json = False) -> None:
    """Exit with 0 if the server takes steps, 1 if it drains, 2 if it cannot be reached."""
    with stepwire.connect(target, timeout=timeout) as client:
        info = client.info()
    if as_json:
        print(json.dumps(dataclasses.asdict(info)))
    else:
        device = ", ".join(info.devices)
        state = "draining" if info.draining else "serving"
        print(f"{target}: {state}, version {info.version}, {info.sessions} sessions on {device}")
    raise typer.Exit(1 if info.draining else 0)


@sessions_app.command("list")
def list_sessions(target: _Target = _DEFAULT_TARGET, timeout: _Timeout = 10.0, as_json: _Json = False) -> None:
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
def show_session(
    session_id: str, target: _Target = _DEFAULT_TARGET, timeout: _Timeout = 10.0, as_json: _Json = False
) -> None:
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
def close_session(
    session_id: str, target: _Target = _DEFAULT_TARGET, timeout: _Timeout = 10.0, as_json: _Json = False
) -> None:
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


@app.command()
def version(as_json: _Json = False) -> None:
    """Print the version."""
    print(json.dumps({"version": stepwire.__version__}) if as_json else f"stepwire {stepwire.__version__}")


def _plain(session: SessionInfo) -> dict[str, Any]:
    values = dataclasses.asdict(session)
    for name in ("create_time", "expire_time"):
        values[name] = values[name].isoformat()
    return values
