"""A session that trains while others flood the server: its steps before and during each flood, and who else is served.

The attacker is a process of its own (`flood_child`). It opens 400 calls a second over eight connections.
"""

from __future__ import annotations

import pathlib
import statistics
import time
from typing import Any, Final, NamedTuple

import grpc
import numpy as np

import stepwire
from child import child, python
from contest import timed
from flood_child import KINDS
from stepwire_server.processes.spawn import server_process

__all__ = ["SLOWEST_ADMIN", "SLOWEST_HEALTH", "WORST_RATIO", "Scale", "floods"]

WORST_RATIO: Final = "slowest steps to those before"
SLOWEST_HEALTH: Final = "slowest health check ms"
SLOWEST_ADMIN: Final = "slowest listing and end of a session ms"
_SIZE: Final = 1_000
_LOOKS: Final = 3
_HEALTH: Final = "/grpc.health.v1.Health/Check"


class Scale(NamedTuple):
    """The sizes of the section.

    Attributes:
        seconds: the time of the steps before each flood, and during it.
        kinds: the floods.
    """

    seconds: float = 5.0
    kinds: tuple[str, ...] = KINDS

    @classmethod
    def quick(cls) -> Scale:
        """Return the sizes of the short form."""
        return cls(seconds=0.2, kinds=("silent_call", "refused_call"))


def floods(scale: Scale) -> dict[str, Any]:
    """Return the median steps before and during each flood, and the slowest health checks and calls of operators."""
    figures: dict[str, Any] = {"parameters": _SIZE, "seconds": scale.seconds}
    found = {kind: _flooded(scale, kind) for kind in scale.kinds}
    for kind, each in found.items():
        name = kind.replace("_", " ")
        figures |= {f"{name} {figure}": value for figure, value in each._asdict().items()}
    figures[WORST_RATIO] = max(each.during_ms / each.before_ms for each in found.values())
    figures[SLOWEST_HEALTH] = max(each.health_ms for each in found.values())
    figures[SLOWEST_ADMIN] = max(each.admin_ms for each in found.values())
    return figures


class _Flooded(NamedTuple):
    """The times beside one flood, in milliseconds.

    Attributes:
        before_ms: a step before the flood.
        during_ms: a step during it.
        health_ms: the slowest health check.
        admin_ms: the slowest creation, listing and end of a session, by a client that connects anew.
        grown_mib: the resident memory of the server that came with the flood.
    """

    before_ms: float
    during_ms: float
    health_ms: float
    admin_ms: float
    grown_mib: float


def _flooded(scale: Scale, kind: str) -> _Flooded:
    """Measure one flood, against a server of its own."""
    with server_process("--device", "cpu") as server, stepwire.connect(server.target, transport="tcp") as client:
        session: Any = client.create_session({"w": np.zeros(_SIZE, np.float32)})
        _median_step(session, scale.seconds / 4)
        before, resident = _median_step(session, scale.seconds), _resident_mib(server.pid)
        with child(python(pathlib.Path(__file__).with_name("flood_child.py"), server.target, kind)) as flood:
            if flood.read() != "ready":
                raise RuntimeError("the flood did not begin")
            during = _median_step(session, scale.seconds)
            health = max(timed(lambda: _check_health(server.target)) for _ in range(_LOOKS))
            admin = max(timed(lambda: _administer(server.target)) for _ in range(_LOOKS))
            grown = _resident_mib(server.pid) - resident
        return _Flooded(before * 1e3, during * 1e3, health * 1e3, admin * 1e3, grown)


def _median_step(session: Any, seconds: float) -> float:
    gradient, times, end = {"w": np.full(_SIZE, 0.01, np.float32)}, [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        times.append(timed(lambda: session.step(gradient)))
    return statistics.median(times)


def _check_health(target: str) -> None:
    with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        channel.unary_unary(_HEALTH)(b"", timeout=60.0)


def _administer(target: str) -> None:
    """Do as an operator does: connect, make a session, list all and end it."""
    with stepwire.connect(target, transport="tcp", timeout=60.0) as client:
        made = client.create_session({"w": np.zeros(4, np.float32)}, keep=True)
        ids = [each.session_id for each in client.sessions()]
        if made.session_id not in ids:
            raise RuntimeError("a session is not listed")
        made.close()


def _resident_mib(pid: int) -> float:
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024
