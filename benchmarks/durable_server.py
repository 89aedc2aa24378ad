"""A server with a data directory whose syncs may be slow, and that does on request what it else does when it is due.

`python durable_server.py DATA_DIR SYNC_SECONDS` prints its target. Then it does one line of its standard input after
another, and prints a number for each; at the end of the input it stops at once, without a checkpoint.

- `checkpoint ID`, `park ID`, `revive ID`: the seconds that it took.
- `syncs`: the number of syncs so far.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterator

from bare_disk import SlowDisk
from child import Child, child, python
from stepwire_server.config import ServerConfig
from stepwire_server.observability.logs import logging_to_stderr
from stepwire_server.server import Server

__all__ = ["DurableServer", "durable_server"]

_NEVER_SECONDS = 1e6
_JOURNAL_BYTES = 1 << 40
_LOOK_SECONDS = 0.001


class DurableServer:
    """A running server with a data directory.

    Attributes:
        target: the address for clients.
        pid: the number of the process.
    """

    def __init__(self, process: Child) -> None:
        """Wait until the server is ready."""
        self._process = process
        self.target = process.read()
        self.pid = process.pid

    def seconds_to(self, action: str, session_id: str) -> float:
        """Have the server "checkpoint", "park" or "revive" a session, and return the seconds."""
        return float(self._process.ask(f"{action} {session_id}"))

    def syncs(self) -> int:
        """Return the number of syncs so far."""
        return int(self._process.ask("syncs"))


@contextlib.contextmanager
def durable_server(folder: pathlib.Path, sync_seconds: float = 0.0) -> Iterator[DurableServer]:
    """Run a server on a data directory for a block; its end is sudden."""
    with child(python(__file__, folder, sync_seconds)) as process:
        yield DurableServer(process)


def settings(folder: str) -> ServerConfig:
    """Return the settings of a server that takes no checkpoint by itself."""
    return ServerConfig(
        bind="127.0.0.1:0",
        device="cpu",
        log_level="warning",
        data_dir=folder,
        checkpoint_seconds=_NEVER_SECONDS,
        journal_bytes=_JOURNAL_BYTES,
    )


def serve(folder: str, sync_seconds: float) -> None:
    """Serve until standard input ends."""
    disk = SlowDisk(sync_seconds)
    with logging_to_stderr("warning"), Server(settings(folder), disk=disk) as server:
        print(server.target, flush=True)
        for line in sys.stdin:
            action, _, session_id = line.strip().partition(" ")
            print(disk.syncs if action == "syncs" else _seconds_to(server, action, session_id), flush=True)


def _seconds_to(server: Server, action: str, session_id: str) -> float:
    began = time.perf_counter()
    session = server.registry.get(session_id)  # that is the revival of a parked one
    if action == "checkpoint":
        assert server.registry.directory is not None
        server.registry.directory.checkpointer.checkpoint(session)
    elif action == "park":
        while session.idle_seconds(0.0) is None:  # the end of its stream is on the way
            time.sleep(_LOOK_SECONDS)
        began = time.perf_counter()
        if not server.registry.park(session):
            raise RuntimeError(f"session {session_id} could not be parked")
    return time.perf_counter() - began


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
