"""The command `stepwire serve`: one server in this process, or several in processes of their own."""

from __future__ import annotations

import functools
import gc
import os
import pathlib
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any, Final

import structlog
import typer

from stepwire_server.cli.options import takes_settings
from stepwire_server.config import ServerConfig, kubernetes_variables, load_config, silence_grpc
from stepwire_server.engines.compiled import cache as kernel_cache
from stepwire_server.host import heap, limits, parent, serving_thread
from stepwire_server.observability.logs import configure_logging, discard_unwritten_lines

__all__ = ["RESTART_EXIT_CODE", "serve"]

RESTART_EXIT_CODE: Final = os.EX_TEMPFAIL
"""The exit code of a server that only a new process replaces, 75. A device has failed for good, and the new process has
it; or another server has the sessions of a pair, and the new process follows that one."""

_SECOND_SIGNAL_SECONDS: Final = 1.0
"""Signals within this time are one request."""

_log = structlog.get_logger()


@takes_settings()
def serve(
    *,
    config: Annotated[
        pathlib.Path | None, typer.Option(help="The path of a TOML file of settings. Variable: STEPWIRE_CONFIG.")
    ] = None,
    **flags: Any,
) -> None:
    """Run a server until SIGTERM or SIGINT; steps under way finish, new steps are refused, and the exit code is 0.

    A second signal, a second later, ends the wait for steps. After a GPU has failed for good the server ends by itself,
    with exit code 75, and after gRPC has failed with 71: start it again. So does a server with --standby-of directory
    that was overtaken, with 75: started again, it follows its successor.

    Every setting is a flag, an environment variable STEPWIRE_<NAME> and a key of the TOML file. Flags win over
    variables, and variables over the file. A number of bytes may have a unit, such as 8G or 512MiB.
    """
    settings = load_config(flags, file=config)
    configure_logging(settings.log_level, settings.log_json)
    silence_grpc()
    if ignored := kubernetes_variables():
        _log.info("variables of kubernetes are ignored", variables=ignored)
    limits.require_descriptors()
    kernel_cache.require_named_directory()
    try:
        code = _serve(settings) if settings.processes == 1 else _supervise(settings)
    finally:
        discard_unwritten_lines()
    raise typer.Exit(code)


def _serve(settings: ServerConfig) -> int:
    """Run one server in this process; returns the exit code."""
    from stepwire_server.server import Server  # here, because a parent of several processes must not load gRPC

    heap.configure()
    stop, hasten = threading.Event(), threading.Event()
    _on_signals(functools.partial(_stop_or_hasten, stop, hasten, []))
    parent.follow(settings.parent_pid, stop.set)
    serving_thread.end_with_serving_thread()
    with Server(settings) as server:
        server.on_lost(stop.set)
        # The objects of imports and start-up live as long as the process: the collector must not walk them again and
        # again in the middle of steps.
        gc.collect()
        gc.freeze()
        stop.wait()
        threading.Thread(target=_hasten, args=(hasten, server.hasten), name="hasten", daemon=True).start()
        drained = server.drain()
        if server.lost:
            # What waits for a lost device may wait for ever, so nothing is closed. The log's lines are written already.
            os._exit(RESTART_EXIT_CODE)
        return 0 if drained else 1


def _stop_or_hasten(stop: threading.Event, hasten: threading.Event, signalled: list[float]) -> None:
    """Stop at a first signal, and hasten at one that comes later.

    One request may bring two signals at once: Ctrl-C goes to a server and to its parent, who passes it on.
    """
    signalled.append(time.monotonic())
    stop.set()
    if signalled[-1] - signalled[0] >= _SECOND_SIGNAL_SECONDS:
        hasten.set()


def _hasten(asked: threading.Event, hasten: Callable[[], None]) -> None:
    asked.wait()
    _log.info("hastened")
    hasten()


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
    """Call `stop` at every SIGTERM and SIGINT until the process ends, in a thread of its own.

    The interpreter runs a handler in the main thread, but the kernel may deliver a signal to any thread. Delivered to
    another one just before the main thread blocks, a signal would wait until the main thread wakes, so perhaps for
    ever. The wakeup descriptor has no such gap: whichever thread gets the signal writes to it.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)

    def watch(reader: socket.socket, writer: socket.socket) -> None:  # the writer is kept, and so stays open
        while reader.recv(1):
            stop()

    threading.Thread(target=watch, args=(reader, writer), name="signals", daemon=True).start()
