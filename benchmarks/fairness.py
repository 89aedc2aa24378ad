"""Many small sessions beside a large one, each in a closed loop: the shares of each, and the small ones' waits.

Clients are few processes, and messages are made by hand (`fairness_child`), so that the server is what is measured.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np

from child import Child, child, python
from fairness_server import FairnessServer, fairness_server
from stepwire_server.devices.fair_share import FairShare
from stepwire_server.engines.cpu.engine import CpuEngine

__all__ = ["JAIN", "LARGE_SHARE", "P99_TO_P50", "Scale", "fairness", "jains_index"]

JAIN: Final = "Jain's index of the small"
P99_TO_P50: Final = "small p99 to p50"
LARGE_SHARE: Final = "large share of the engine's time"
_BATCHES: Final = 9
_BATCH: Final = 10_000


class Scale(NamedTuple):
    """The sizes of the section.

    Attributes:
        small: the number of small sessions.
        small_size: the parameters of each.
        large_size: the parameters of the large one.
        processes: the processes of the small ones' clients.
        seconds: the time that is measured.
    """

    small: int = 256
    small_size: int = 10_000
    large_size: int = 16_000_000
    processes: int = 2
    seconds: float = 60.0

    @classmethod
    def quick(cls) -> Scale:
        """Return the sizes of the short form."""
        return cls(small=8, large_size=4_000_000, processes=1, seconds=1.0)


class _Steps(NamedTuple):
    """The steps of a process.

    Attributes:
        counts: the number of steps of each session.
        seconds: the time of each step.
    """

    counts: list[int]
    seconds: list[float]


def fairness(scale: Scale) -> dict[str, Any]:
    """Return the steps of both kinds side by side, and the shares of the engine's time."""
    each = scale.small // scale.processes
    with fairness_server(scale.small + 1) as server, contextlib.ExitStack() as stack:
        groups = [(scale.small_size, each)] * scale.processes + [(scale.large_size, 1)]
        clients = [stack.enter_context(_clients(server, size, count)) for size, count in groups]
        for client in clients:
            if client.read() != "ready":
                raise RuntimeError("a client is not ready")
        before = server.engine_seconds()
        *small, large = _step_all(clients, scale.seconds)
        used = {size: seconds - before[size] for size, seconds in server.engine_seconds().items()}
    return _figures(scale, small, large, used[scale.large_size] / sum(used.values()))


def jains_index(values: Sequence[float]) -> float:
    """Return Jain's index of fairness: 1 for equal values, 1/n where one of n has everything."""
    return float(np.sum(values) ** 2 / (len(values) * np.sum(np.square(values))))


def _clients(server: FairnessServer, size: int, count: int) -> contextlib.AbstractContextManager[Child]:
    return child(python(pathlib.Path(__file__).with_name("fairness_child.py"), server.target, size, count))


def _step_all(clients: Sequence[Child], seconds: float) -> list[_Steps]:
    with ThreadPoolExecutor(len(clients)) as threads:
        return [_Steps(**json.loads(line)) for line in threads.map(lambda client: client.ask(str(seconds)), clients)]


def _figures(scale: Scale, small: Sequence[_Steps], large: _Steps, share: float) -> dict[str, Any]:
    counts = [float(count) for each in small for count in each.counts]
    p50, p99 = np.percentile([one for each in small for one in each.seconds], (50, 99))
    return {
        "small sessions": scale.small,
        "small parameters": scale.small_size,
        "large parameters": scale.large_size,
        "seconds": scale.seconds,
        "small steps a second": sum(counts) / scale.seconds,
        "small p50 ms": p50 * 1e3,
        "small p99 ms": p99 * 1e3,
        P99_TO_P50: p99 / p50,
        JAIN: jains_index(counts),
        "large steps": len(large.seconds),
        "large p50 ms": float(np.median(large.seconds)) * 1e3,
        LARGE_SHARE: share,
        "free turn us": _free_turn_seconds() * 1e6,
    }


def _free_turn_seconds() -> float:
    """Return the time of a turn that nobody else wants."""
    engine = CpuEngine(threads=1)
    state, flow = engine.staging(1), FairShare().flow(1)
    times = []
    for _ in range(_BATCHES):
        began = time.perf_counter()
        for _ in range(_BATCH):
            flow.release(flow.acquire(1, state))
        times.append((time.perf_counter() - began) / _BATCH)
    engine.close()
    return statistics.median(times)
