"""Servers in processes of their own, for demos, benchmarks and tests."""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from stepwire.errors import UnavailableError
from stepwire_server.processes.port_file import await_ports

__all__ = ["ServerProcess", "ServerProcesses", "server_process", "server_processes"]

_START_SECONDS = 60.0
_STANDARD_ERROR = 2


class ServerProcess(NamedTuple):
    """A running server.

    Attributes:
        target: the address for clients, `host:port`.
        pid: the number of the process.
    """

    target: str
    pid: int


class ServerProcesses(NamedTuple):
    """Running servers.

    Attributes:
        targets: the address of each server, `host:port`.
        pid: the number of the parent process.
    """

    targets: tuple[str, ...]
    pid: int


@contextlib.contextmanager
def server_process(*flags: str) -> Iterator[ServerProcess]:
    """Run `stepwire serve` on a free port for a block; at the end the server is terminated, and drains.

    Args:
        flags: further flags of the command.

    Yields:
        The running server.

    Raises:
        UnavailableError: the server did not come up; its own message is on standard error.
    """
    with _serving(*flags) as (ports, pid):
        yield ServerProcess(f"127.0.0.1:{ports[0]}", pid)


@contextlib.contextmanager
def server_processes(count: int, *flags: str) -> Iterator[ServerProcesses]:
    """Run `stepwire serve --processes COUNT` on free ports for a block; at the end all are terminated, and drain.

    Args:
        count: the number of server processes.
        flags: further flags of the command.

    Yields:
        The running servers.

    Raises:
        UnavailableError: a server did not come up; its own message is on standard error.
    """
    with _serving("--processes", str(count), *flags) as (ports, pid):
        yield ServerProcesses(tuple(f"127.0.0.1:{port}" for port in ports), pid)


@contextlib.contextmanager
def _serving(*flags: str) -> Iterator[tuple[list[int], int]]:
    with tempfile.TemporaryDirectory(prefix="stepwire-") as folder:
        port_file = pathlib.Path(folder, "port")
        command = [sys.executable, "-m", "stepwire_server", "serve", "--bind", "127.0.0.1:0"]
        # A program that is killed ends no process, and the server would stay for ever without --parent-pid.
        command += ["--port-file", str(port_file), "--parent-pid", str(os.getpid()), "--log-level", "warning", *flags]
        # Programs read the standard output of this process, so the log lines of the server go to standard error.
        # Ctrl-C goes to every process of the terminal's group. The server is in a group of its own: only its parent
        # ends it, and it has no trace to print.
        process = subprocess.Popen(command, stdout=_STANDARD_ERROR, process_group=0)
        ports: list[int] = []
        try:
            deadline = time.monotonic() + _START_SECONDS
            ports = await_ports(process, port_file, lambda: time.monotonic() < deadline)
            if not ports:
                raise UnavailableError(
                    f"the server process did not start (exit code {process.poll()}); its message is above"
                )
            yield ports, process.pid
        finally:
            if ports and (code := process.poll()) is not None:
                print(
                    f"the server process {process.pid} ended before it was told to: exit code {code}", file=sys.stderr
                )
            process.terminate()
            process.wait()
