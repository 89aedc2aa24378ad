"""A server as a process of its own, for demos, benchmarks and tests that need the process."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

from stepwire.errors import UnavailableError

__all__ = ["ServerProcess", "server_process"]

_START_SECONDS = 60.0
_LOOK_SECONDS = 0.02


class ServerProcess(NamedTuple):
    """A running server: where clients connect, and its process id."""

    target: str
    pid: int


@contextlib.contextmanager
def server_process(*flags: str) -> Iterator[ServerProcess]:
    """Run `stepwire serve` on a free port for a block; it is terminated, and drains, at the end.

    Args:
        flags: further flags of the command.

    Raises:
        UnavailableError: it did not come up; its own message is on standard error.
    """
    with tempfile.TemporaryDirectory(prefix="stepwire-") as folder:
        port_file = pathlib.Path(folder, "port")
        command = [sys.executable, "-m", "stepwire_server", "serve", "--bind", "127.0.0.1:0"]
        process = subprocess.Popen([*command, "--port-file", str(port_file), "--log-level", "warning", *flags])
        try:
            yield ServerProcess(f"127.0.0.1:{_await_port(process, port_file)}", process.pid)
        finally:
            process.terminate()
            process.wait()


def _await_port(process: subprocess.Popen[bytes], port_file: pathlib.Path) -> int:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if port_file.exists():
            return int(port_file.read_text())
        if process.poll() is not None:
            break
        time.sleep(_LOOK_SECONDS)
    raise UnavailableError(f"the server process did not start (exit code {process.poll()}); its message is above")
