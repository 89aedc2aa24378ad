"""Very many clients of one server with its default settings, each attached over a connection of its own."""

from __future__ import annotations

import contextlib
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np

from child import Child, child, python
from fairness import jains_index
from stepwire_server.processes.spawn import ServerProcess, server_process

__all__ = ["ERRORS", "Scale", "many"]

ERRORS: Final = "errors"


class Scale(NamedTuple):
    """The sizes of the section.

    Attributes:
        clients: the number of clients.
        size: the parameters of each one's session.
        processes: the processes of the clients.
        seconds: the time that is measured.
    """

    clients: int = 1000
    size: int = 1000
    processes: int = 2
    seconds: float = 60.0

    @classmethod
    def quick(cls) -> Scale:
        """Return the sizes of the short form."""
        return cls(clients=20, processes=1, seconds=0.5)


def many(scale: Scale) -> dict[str, Any]:
    """Return the steps and errors of all clients, and the threads and the memory that each costs the server."""
    each = scale.clients // scale.processes
    path = pathlib.Path(__file__).with_name("many_child.py")
    with server_process("--device", "cpu") as server, contextlib.ExitStack() as stack:
        warm = _warmed(stack, server, scale, path)
        command = python(path, server.target, scale.size, each)
        clients = [stack.enter_context(child(command)) for _ in range(scale.processes)]
        for client in clients:
            if client.read() != "ready":
                raise RuntimeError("a client is not ready")
        attached = _status(server)
        with ThreadPoolExecutor(len(clients)) as threads:
            found = [json.loads(line) for line in threads.map(lambda one: one.ask(str(scale.seconds)), clients)]
    return _figures(scale, found, {name: attached[name] - warm[name] for name in attached})


def _warmed(stack: contextlib.ExitStack, server: ServerProcess, scale: Scale, path: pathlib.Path) -> dict[str, int]:
    """Have one client step, so that kernels are there, and return what the server has then."""
    first: Child = stack.enter_context(child(python(path, server.target, scale.size, 1)))
    if first.read() != "ready":
        raise RuntimeError("the first client is not ready")
    return _status(server)


def _status(server: ServerProcess) -> dict[str, int]:
    lines = pathlib.Path(f"/proc/{server.pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[name].split()[0]) for name in ("VmRSS", "Threads")}


def _figures(scale: Scale, found: list[dict[str, Any]], grown: dict[str, int]) -> dict[str, Any]:
    counts = [float(count) for each in found for count in each["counts"]]
    seconds = [one for each in found for one in each["seconds"]]
    p50, p99 = np.percentile(seconds, (50, 99))
    return {
        "clients": len(counts),
        "parameters": scale.size,
        "seconds": scale.seconds,
        ERRORS: sum(each["errors"] for each in found),
        "steps a second": sum(counts) / scale.seconds,
        "p50 ms": float(p50) * 1e3,
        "p99 ms": float(p99) * 1e3,
        "Jain's index": jains_index(counts),
        "KiB of the server a client": grown["VmRSS"] / scale.clients,
        "threads of the server a client": grown["Threads"] / scale.clients,
    }
