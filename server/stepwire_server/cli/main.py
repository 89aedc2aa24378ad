"""The command `stepwire`: flags in, exit codes out. What it does lives elsewhere."""

from __future__ import annotations

import dataclasses
import gc
import json
import pathlib
import queue
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Annotated

import typer

import stepwire
from stepwire_server.cli.sessions import Json, Target, Timeout, sessions_app
from stepwire_server.config import ServerConfig, load_config
from stepwire_server.doctor import machine as doctor
from stepwire_server.engines.compiled import cache as kernel_cache
from stepwire_server.host import heap, parent
from stepwire_server.observability.logs import configure_logging

__all__ = ["main"]

app = typer.Typer(
    name="stepwire",
    help="The optimizer as a service: stateful, exactly-once Adam steps over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(sessions_app)

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
    bind: Annotated[
        str | None, typer.Option(help="Address, host:port; port 0 takes a free one. Or unix:/path, for no port.")
    ] = None,
    unix_socket: Annotated[
        str | None, typer.Option(help="A Unix socket besides, its path; auto: a private one; off: none.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Server processes, each on a port of its own from that of --bind on.")
    ] = None,
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
    shared_memory: Annotated[
        bool | None,
        typer.Option("--shared-memory/--no-shared-memory", help="Share memory with clients on this machine."),
    ] = None,
    cuda_ipc: Annotated[
        bool | None,
        typer.Option("--cuda-ipc/--no-cuda-ipc", help="Share memory of a GPU with clients on it."),
    ] = None,
    handoff_socket: Annotated[
        str | None, typer.Option(help="The Unix socket that hands it over, its path; default a private one.")
    ] = None,
    handoff_uids: Annotated[
        str | None, typer.Option(help="Users that may share memory besides the server's own: 1000,1001.")
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
    kernel_cache.require_named_directory()
    raise typer.Exit(_serve(settings) if settings.processes == 1 else _supervise(settings))


def _serve(settings: ServerConfig) -> int:
    """Run one server in this process; returns the exit code."""
    from stepwire_server.server import Server  # here, because a parent of several processes must not load gRPC

    heap.configure()
    # Not an event: a second signal inside its `set` would wait for the lock that the first one holds, for ever.
    stop: queue.SimpleQueue[None] = queue.SimpleQueue()
    _on_signals(lambda: stop.put(None))
    parent.follow(settings.parent_pid, lambda: stop.put(None))
    with Server(settings) as server:
        # What imports and start-up made lives as long as the process: keep the collector from walking it again and
        # again in the middle of steps.
        gc.collect()
        gc.freeze()
        stop.get()
        return 0 if server.drain() else 1


def _supervise(settings: ServerConfig) -> int:
    """Run several servers, each in a process of its own; returns the exit code."""
    from stepwire_server.processes.split_settings import divide, look_at_machine
    from stepwire_server.processes.supervisor import Supervisor

    with tempfile.TemporaryDirectory(prefix="stepwire-") as folder:
        home = pathlib.Path(folder)
        configs = divide(settings, look_at_machine(settings.device), home)
        supervisor = Supervisor(configs, home, port_file=settings.port_file)
        _on_signals(supervisor.stop)
        parent.follow(settings.parent_pid, supervisor.stop)
        return supervisor.run()


def _on_signals(stop: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    output: Annotated[pathlib.Path, typer.Option(help="Folder for the plot.")] = pathlib.Path("demo-output"),
    device: Annotated[str | None, typer.Option(help="Device of the server that is started; default auto.")] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help="Train against this running server, host:port or unix:/path, instead."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a small network on handwritten digits against a server in another process."""
    from stepwire_server.demo import run_demo

    if device is not None and target is not None:
        raise typer.BadParameter("--device is of a server that is started; the one at --target has its own")
    report = run_demo(steps=steps, output=output, device=device or "auto", target=target, quiet=as_json)
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print(report.text())


@app.command("doctor")
def diagnose(
    device: Annotated[str | None, typer.Option(help=f"What a server would be told: {_DEVICES}")] = None,
    bind: Annotated[str | None, typer.Option(help="Where it would listen, host:port.")] = None,
    config: Annotated[pathlib.Path | None, typer.Option(help="A TOML file of settings.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Try the ways to this running server from here, instead.")
    ] = None,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Check this machine for a server: exit with 0 if it can serve, 1 if not; each problem with its remedy.

    Settings are read as `serve` reads them: flags, then STEPWIRE_<NAME>, then the file. With --target: which transports
    work between here and a server, which of them is used, and what the others lack.
    """
    if target is None:
        settings = load_config({"device": device, "bind": bind}, file=config)
        findings = doctor.examine(settings.device, settings.bind)
    else:
        from stepwire_server.doctor.target import examine_target

        findings = examine_target(target, timeout)
    healthy = doctor.healthy(findings)
    if as_json:
        print(json.dumps({"healthy": healthy, "findings": [finding._asdict() for finding in findings]}))
    else:
        print(doctor.report(findings))
    raise typer.Exit(0 if healthy else 1)


@app.command()
def health(target: Target, timeout: Timeout = 5.0, as_json: Json = False) -> None:
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


@app.command()
def kernels(
    directory: Annotated[pathlib.Path, typer.Argument(help="Where they are kept; made if need be.")],
    as_json: Json = False,
) -> None:
    """Compile the commonest kernels ahead, as for a container image, for every level of x86-64 processors.

    A server finds them through STEPWIRE_KERNELS. On other processors nothing is compiled ahead.
    """
    from stepwire_server.engines import ahead

    levels = ahead.make(directory)
    print(json.dumps({"levels": levels}) if as_json else f"{directory}: kernels for {', '.join(levels) or 'no level'}")


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    print(json.dumps({"version": stepwire.__version__}) if as_json else f"stepwire {stepwire.__version__}")
