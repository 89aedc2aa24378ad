"""A server in a process of its own that kills itself at a named point.

The points lie before and behind the stages of a step, of a checkpoint, and of a start. Nothing of this is in the
server: here its functions are wrapped. The process is forked from one that has imported the server, which takes most of
a start's time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from stepwire_server.config import ServerConfig
from stepwire_server.durability import checkpoint, mirror
from stepwire_server.durability.body import BodyWriter
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.epochs import Epochs
from stepwire_server.durability.object_store import ObjectStore
from stepwire_server.durability.session_log import EntryLog
from stepwire_server.durability.store_epochs import StoreEpochs
from stepwire_server.durability.writer import LogWriter
from stepwire_server.observability.logs import configure_logging
from stepwire_server.rpc.attach import StepStream
from stepwire_server.server import Server
from stepwire_server.sessions.own_steps import OwnSteps
from stepwire_server.sessions.progress import Progress
from stepwire_server.sessions.rounds import Rounds
from stepwire_server.steps.commit import Commit
from stepwire_server.steps.step import Step
from tests.support.numpy_server import numpy_pool

__all__ = ["POINTS", "STORE_POINTS", "WORKER_POINTS", "CrashingServer"]

_PLACES: dict[str, tuple[Any, str]] = {
    "receive": (Step, "add"),
    "check": (OwnSteps, "_commit"),
    "apply": (Commit, "apply"),
    "append chunk": (EntryLog, "chunk"),
    "append commit": (EntryLog, "commit"),
    "write": (Disk, "write"),
    "sync": (Disk, "sync"),
    "look": (Epochs, "is_owner"),
    "wait": (LogWriter, "wait"),
    "answer": (StepStream, "_result"),
    "checkpoint write": (BodyWriter, "write"),
    "manifest": (checkpoint, "write_manifest"),
    "rename": (Disk, "rename"),
    "remove": (Disk, "remove"),
    "folder sync": (Disk, "sync_folder"),
    "epoch": (Epochs, "acquire"),
}
_STORE_PLACES: dict[str, tuple[Any, str]] = {
    "store epoch": (StoreEpochs, "acquire"),
    "store look": (StoreEpochs, "newest"),
    "upload": (ObjectStore, "upload"),
    "put": (ObjectStore, "put"),
    "index": (mirror, "write_index"),
    "store delete": (ObjectStore, "delete"),
}
_WORKER_PLACES: dict[str, tuple[Any, str]] = {
    "contribute": (Rounds, "_add"),
    "reduce": (Rounds, "_reduce"),
    "round": (Rounds, "_apply"),
    "drop": (Progress, "dropped"),
}
POINTS = tuple(f"{when} {place}" for place in _PLACES for when in ("before", "after"))
WORKER_POINTS = tuple(f"{when} {place}" for place in _WORKER_PLACES for when in ("before", "after"))
STORE_POINTS = tuple(f"{when} {place}" for place in _STORE_PLACES for when in ("before", "after"))


def _crash(function: Callable[..., Any], *, after: bool, count: int) -> Callable[..., Any]:
    """Return a function that kills the process before or after its `count`th call."""
    calls = 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        due = calls == count
        if due and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return function(*args, **kwargs)
        finally:
            if due and after:
                os.kill(os.getpid(), signal.SIGKILL)

    return called


class CrashingServer:
    """A server in a process of its own.

    Attributes:
        port: its port; None for one that died before it listened.
    """

    def __init__(self, data_dir: pathlib.Path, point: str = "", count: int = 0, store: str = "") -> None:
        """Start a server that dies at the `count`th passing of a point, or at none, and wait until it listens."""
        self._ours, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs, point, count, str(data_dir), store))
        self._process.start()
        theirs.close()
        try:
            self.port = int(self._ours.recv_bytes())
        except EOFError:
            self.port = None

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kill it, if it lives."""
        self._process.kill()

    def wait(self) -> None:
        """Wait for its end."""
        self._process.join()
        self._ours.close()


def _serve(parent: Connection, point: str, count: int, data_dir: str, store: str) -> None:
    """Serve until the parent has ended."""
    if point:
        when, _, place = point.partition(" ")
        owner, name = (_PLACES | _STORE_PLACES | _WORKER_PLACES)[place]
        setattr(owner, name, _crash(getattr(owner, name), after=when == "after", count=count))
    config = ServerConfig(
        bind="127.0.0.1:0",
        device="cpu",
        data_dir=data_dir,
        checkpoint_store=store,
        max_chunk_bytes=64 << 10,
        sweep_seconds=0.05,
        journal_segment_bytes=1 << 20,
    )
    configure_logging("error", True)
    with Server(config, pool=numpy_pool()) as server, contextlib.suppress(EOFError):
        parent.send_bytes(str(server.port).encode())
        parent.recv_bytes()


_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])
