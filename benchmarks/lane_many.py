"""Many small sessions on one host: over compiled lanes, over packet lanes in Python, and over TCP.

The same clients with nothing but doorbells are beside them: what two wakes and a loop in Python leave of two cores.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from child import child, python
from doorbell import doorbell_process
from fairness import jains_index
from stepwire_server.processes.spawn import server_process

__all__ = ["COMPILED_JAIN", "COMPILED_TO_TCP", "Scale", "lane_many"]

COMPILED_TO_TCP: Final = "many compiled to tcp"
COMPILED_JAIN: Final = "many compiled Jain's index"
_COMPILING_SECONDS: Final = 20.0
"""The longest time that a loop is compiled in, on a machine without a kernel cache."""

_WAYS: Final = {
    "compiled": ("packets", ()),
    "packets": ("packets", ("--no-compiled-lanes",)),
    "tcp": ("tcp", ()),
}


class Scale(NamedTuple):
    """The sizes of the section.

    Attributes:
        sessions: the number of sessions.
        processes: the client processes.
        size: the parameters of a session.
        seconds: the time that is measured.
        warm_seconds: the time before, in which loops are compiled.
    """

    sessions: int = 256
    processes: int = 8
    size: int = 1_000
    seconds: float = 20.0
    warm_seconds: float = _COMPILING_SECONDS

    @classmethod
    def quick(cls) -> Scale:
        """Return the sizes of the short form."""
        return cls(sessions=4, processes=2, seconds=0.2, warm_seconds=0.2)


def lane_many(scale: Scale) -> dict[str, Any]:
    """Return the steps a second and Jain's index of each way, and the ratios of steps."""
    rates, figures = dict[str, float](), dict[str, Any]({"many sessions": scale.sessions})
    for way, (transport, flags) in _WAYS.items():
        with server_process("--device", "cpu", *flags) as server:
            counts = _counts(server.target, transport, scale)
        rates[way] = sum(counts) / scale.seconds
        figures[f"many {way} steps a second"] = rates[way]
        figures[f"many {way} Jain's index"] = jains_index([float(count) for count in counts])
    with doorbell_process() as path:
        rates["doorbell"] = sum(_counts(path, "doorbell", scale._replace(warm_seconds=0.0))) / scale.seconds
    figures["many doorbells a second"] = rates["doorbell"]
    for one, other in (("compiled", "packets"), ("compiled", "tcp"), ("compiled", "doorbell"), ("doorbell", "tcp")):
        figures[f"many {one} to {other}"] = rates[one] / rates[other]
    return figures


def _counts(target: str, transport: str, scale: Scale) -> list[int]:
    path, each = pathlib.Path(__file__).with_name("lane_child.py"), scale.sessions // scale.processes
    with contextlib.ExitStack() as stack:
        command = python(path, target, transport, scale.size, each)
        clients = [stack.enter_context(child(command)) for _ in range(scale.processes)]
        for client in clients:
            if client.read() != "ready":
                raise RuntimeError("a client is not ready")
        time.sleep(scale.warm_seconds)
        with ThreadPoolExecutor(len(clients)) as threads:
            lines = list(threads.map(lambda one: one.ask(str(scale.seconds)), clients))
    return [count for line in lines for count in json.loads(line)]
