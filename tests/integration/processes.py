"""A server in a process of its own, for what only a process can show: signals, exit codes, sudden death."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO, Any

__all__ = ["ServerProcess", "run_command"]

# Only bounds a test that would hang; a cold start compiles kernels.
_PATIENCE_SECONDS = 120.0


class ServerProcess:
    """`stepwire serve` on a free port. A context manager; killed at the end if it still runs.

    Attributes:
        target: where clients connect.
    """

    def __init__(self, *flags: str, errors: IO[str] | None = None) -> None:
        """Start, and wait until it listens; `errors` gets its standard error."""
        command = [sys.executable, "-m", "stepwire_server", "serve", "--bind", "127.0.0.1:0", "--device", "cpu"]
        self._process = subprocess.Popen(
            [*command, "--log-json", "--log-level", "info", *flags], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        self._events: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        self.target: str = self.wait_for("listening")["target"]

    def wait_for(self, event: str) -> Mapping[str, Any]:
        """Wait until the server logs an event; returns the line."""
        while (line := self._events.get(timeout=_PATIENCE_SECONDS)) is not None:
            if line.get("event") == event:
                return line
        raise AssertionError(f"the server ended (exit code {self._process.wait()}) without logging {event!r}")

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self._process.pid

    def kill(self) -> None:
        """End it as a crash does: SIGKILL."""
        self._process.kill()
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def exit_code(self) -> int:
        """Wait until the process has ended by itself."""
        return self._process.wait(_PATIENCE_SECONDS)

    def __enter__(self) -> ServerProcess:
        """Use the server for a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill what still runs."""
        self.kill()
        self._reader.join()

    def _read(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                self._events.put(json.loads(line) if line.startswith("{") else {"event": "", "text": line})
        self._events.put(None)


def run_command(*arguments: str) -> int:
    """Run the command `stepwire` and return its exit code."""
    command = [sys.executable, "-m", "stepwire_server", *arguments]
    return subprocess.run(command, capture_output=True, timeout=_PATIENCE_SECONDS, check=False).returncode
