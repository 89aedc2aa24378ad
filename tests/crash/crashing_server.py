"""A server that kills itself at a named point: `python -m tests.crash.crashing_server POINT COUNT DATA_DIR [STORE]`.

The points lie before and behind the stages of a step, of a checkpoint, and of a start. Nothing of this is in the
server: here its functions are wrapped. It prints its port in a line, and runs until it is killed or its standard input
ends.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
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

__all__ = ["POINTS", "STORE_POINTS", "WORKER_POINTS"]

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


def main(point: str, count: int, data_dir: str, store: str = "") -> None:
    """Serve until the end of standard input."""
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
    with Server(config, pool=numpy_pool()) as server:
        print(server.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
