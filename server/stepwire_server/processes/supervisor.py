"""Several server processes under one parent, which starts, watches and ends them, and does nothing else.

One process has one interpreter and so one lock; several processes have several. Processes share nothing: each has
addresses, sessions and a budget of its own, and a client of several processes connects to each.

**The parent never loads gRPC.** gRPC's threads and locks do not survive a fork, so the processes are started from
nothing (`python -m stepwire_server serve`) and get their settings through the environment.

**A process that dies is started again, on its address.** Its sessions are gone in any case. A process that listens
tells their clients so (`SESSION_NOT_FOUND`, with the last step that the client knows of); on a dead port clients would
repeat their calls until they run out of time. Clients of other processes go on. Nothing is recreated silently. The
alternative, to end the other processes too, would end healthy sessions. A process that somebody ends by hand is started
again too, so that processes can be renewed one by one. A process that does not come up at the first start ends
everything: the cause is no accident but a wrong setting.
"""

from __future__ import annotations

import os
import pathlib
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
import structlog

from stepwire.wire.addresses import unix_path
from stepwire_server.config import ENVIRONMENT, ServerConfig, environment_of
from stepwire_server.processes.port_file import await_ports, write_ports

__all__ = ["Supervisor"]

_log = structlog.get_logger()

_FIRST_PAUSE_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 30.0


class _Event(NamedTuple):
    """An event that the parent waits for.

    Attributes:
        kind: "stop", or of a child "serving", "exited" or "due" to be started again.
        child: the number of the child.
        value: the port of a child that serves, or the exit code of one that has exited.
    """

    kind: str
    child: int = 0
    value: int = 0


class _Child:
    """One process, and the processes that replace it."""

    def __init__(self, index: int, config: ServerConfig) -> None:
        self.index = index
        self.config = config
        self.process: subprocess.Popen[bytes] | None = None
        self.serving = False
        self.port = 0
        self.failures = 0
        """The number of starts in a row that failed."""
        self.pause: threading.Timer | None = None

    @property
    def target(self) -> str:
        """The address for clients, known once the process serves."""
        return self.config.bind


class Supervisor:
    """Runs server processes until `stop`."""

    def __init__(
        self,
        configs: Sequence[ServerConfig],
        folder: pathlib.Path,
        *,
        port_file: str = "",
        environment: Mapping[str, str] = ENVIRONMENT,
        first_pause_seconds: float = _FIRST_PAUSE_SECONDS,
    ) -> None:
        """Prepare to run.

        Args:
            configs: the settings of each process.
            folder: a private folder for the port files of the processes.
            port_file: the file for the ports once all processes serve, one line each; empty for none.
            environment: the variables of the processes besides settings.
            first_pause_seconds: the pause before a process is started again; it doubles with each start that fails, up
                to 30 s.
        """
        self._children = [_Child(index, config) for index, config in enumerate(configs)]
        self._folder = folder
        self._port_file = port_file
        self._environment = environment
        self._first_pause_seconds = first_pause_seconds
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._announced = False
        self._stopping = False
        self._exit_code = 0

    @property
    def targets(self) -> list[str]:
        """The addresses for clients, in the order of the processes; known once all serve."""
        return [child.target for child in self._children]

    def stop(self) -> None:
        """Have every process drain and end. Safe in a signal handler; stopping twice is harmless."""
        self._events.put(_Event("stop"))

    def run(self) -> int:
        """Start the processes and wait until all have ended.

        Returns:
            The exit code: 0 if all drained in time.
        """
        try:
            for child in self._children:
                self._start(child)
            while any(child.process is not None or child.pause is not None for child in self._children):
                self._handle(self._events.get())
        finally:
            self._kill()
        _log.info("all processes ended", exit_code=self._exit_code)
        return self._exit_code

    def _handle(self, event: _Event) -> None:
        child = self._children[event.child]
        match event.kind:
            case "stop":
                self._stop()
            case "serving":
                self._serving(child, event.value)
            case "exited":
                self._exited(child, event.value)
            case "due":
                child.pause = None
                if not self._stopping:
                    self._start(child)

    def _start(self, child: _Child) -> None:
        port_file = self._folder / f"{child.index}.port"
        port_file.unlink(missing_ok=True)
        config = msgspec.structs.replace(child.config, port_file=str(port_file), parent_pid=os.getpid())
        child.serving = False
        child.process = subprocess.Popen(
            [sys.executable, "-m", "stepwire_server", "serve"], env=environment_of(config, self._environment)
        )
        watch = threading.Thread(
            target=self._watch, args=(child.index, child.process, port_file), name="watch", daemon=True
        )
        watch.start()

    def _watch(self, index: int, process: subprocess.Popen[bytes], port_file: pathlib.Path) -> None:
        """Report the port and the end of a process, from a thread of its own."""
        for port in await_ports(process, port_file):
            self._events.put(_Event("serving", index, port))
        self._events.put(_Event("exited", index, process.wait()))

    def _serving(self, child: _Child, port: int) -> None:
        child.serving, child.port, child.failures = True, port, 0
        if unix_path(child.config.bind) is None:  # the port stays, also for the processes that replace this one
            bind = f"{child.config.bind.rpartition(':')[0]}:{port}"
            child.config = msgspec.structs.replace(child.config, bind=bind)
        if self._announced:
            _log.info("process serves again", process=child.index, target=child.target)
        elif all(other.serving for other in self._children):
            self._announce()

    def _announce(self) -> None:
        self._announced = True
        if self._port_file:
            write_ports(pathlib.Path(self._port_file), (child.port for child in self._children))
        _log.info("all processes serve", targets=self.targets, pids=[_pid(child) for child in self._children])

    def _exited(self, child: _Child, code: int) -> None:
        child.process = None
        if self._stopping:
            if code and child.serving:
                self._exit_code = 1
        elif self._announced:
            self._restart_later(child, code)
        else:
            _log.error("process did not come up", process=child.index, exit_code=code)
            self._exit_code = code if code > 0 else 1
            self._stop()

    def _restart_later(self, child: _Child, code: int) -> None:
        seconds = min(self._first_pause_seconds * 2**child.failures, _LONGEST_PAUSE_SECONDS)
        _log.error(
            "process ended; its sessions are lost and it is started again",
            process=child.index,
            target=child.target,
            exit_code=code,
            seconds=seconds,
        )
        child.failures += 1
        child.pause = threading.Timer(seconds, self._events.put, (_Event("due", child.index),))
        child.pause.daemon = True
        child.pause.start()

    def _stop(self) -> None:
        self._stopping = True
        for child in self._children:
            if child.process is not None:
                child.process.terminate()
            if child.pause is not None:
                child.pause.cancel()
                child.pause = None

    def _kill(self) -> None:
        for child in self._children:
            if child.process is not None:
                child.process.kill()
                child.process.wait()


def _pid(child: _Child) -> int:
    return child.process.pid if child.process is not None else 0
