"""The occupancy of a step: peak memory of client and server, and their growth over many steps.

Clients are processes of their own, without the other memory of a benchmark. Resident memory is that of `/proc`, shared
memory included on either side that maps it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import machine
import variants
from child import output_of, python
from stepwire_server.processes.spawn import ServerProcess

__all__ = ["growth", "memory", "settled_resident_bytes"]

_MIB = 1 << 20
_WARM_SIZE = 1_000
_WARM_STEPS = 500
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 260 / 256}


class Footing(NamedTuple):
    """The occupancy of one process at a moment: bytes of resident memory, and open descriptors."""

    resident_bytes: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Footing:
        """Return the present occupancy of a process."""
        return cls(machine.resident_bytes(pid), len(list(pathlib.Path(f"/proc/{pid}/fd").iterdir())))


def memory(server: ServerProcess, variant: str, *, size: int, looks: int = 16) -> dict[str, float]:
    """Return the MiB of a step beyond the need of client and server.

    The client needs its arrays. The server needs its memory at rest, and the gradient that it receives.
    """
    return _in_client(_MEMORY, server, variant, size, looks)


def growth(server: ServerProcess, variant: str, *, size: int = 10_000, steps: int = 10_000) -> dict[str, float]:
    """Return the growth of client and server over many steps: memory in KiB, and descriptors."""
    return _in_client(_GROWTH, server, variant, size, steps)


def settled_resident_bytes(pid: int, looks: int = 16, pause_seconds: float = 0.5) -> int:
    """Return the least resident memory seen over a while: a server gives free memory back when it is at rest."""
    seen = []
    for _ in range(looks):
        time.sleep(pause_seconds)
        seen.append(machine.resident_bytes(pid))
    return min(seen)


def _in_client(kind: str, server: ServerProcess, variant: str, size: int, count: int) -> dict[str, float]:
    figures: dict[str, float] = json.loads(
        output_of(python(__file__, kind, server.target, server.pid, variant, size, count))
    )
    return figures


def _memory(server: ServerProcess, variant: str, size: int, looks: int) -> dict[str, float]:
    chosen, me = variants.named(variant), os.getpid()
    with contextlib.ExitStack() as stack:
        _steps(variants.open_job(stack, chosen, [server.target], _WARM_SIZE).step, 2)
    gc.collect()
    before = machine.resident_bytes(me)
    with contextlib.ExitStack() as stack:
        job = variants.open_job(stack, chosen, [server.target], size)
        _steps(job.step, 2)
        variants.gradient_of.cache_clear()  # a gradient made in place has no other reference
        rest = settled_resident_bytes(server.pid, looks)
        gc.collect()
        for pid in (me, server.pid):
            machine.reset_peak(pid)
        _steps(job.step, 3)
        client, peak = machine.peak_resident_bytes(me) - before, machine.peak_resident_bytes(server.pid)
        arrays = sum(array.nbytes for holder in job.arrays for array in holder.values())
    received = 0.0 if chosen.transport == "shm" else size * _BYTES[chosen.gradient_dtype]
    return {"client_excess_mib": (client - arrays) / _MIB, "server_excess_mib": (peak - rest - received) / _MIB}


def _growth(server: ServerProcess, variant: str, size: int, steps: int) -> dict[str, float]:
    pids = {"client": os.getpid(), "server": server.pid}
    with contextlib.ExitStack() as stack:
        step = variants.open_job(stack, variants.named(variant), [server.target], size).step
        _steps(step, _WARM_STEPS)
        gc.collect()
        before = {who: Footing.of(pid) for who, pid in pids.items()}
        _steps(step, steps)
        gc.collect()
        after = {who: Footing.of(pid) for who, pid in pids.items()}
    figures: dict[str, float] = {}
    for who in pids:
        figures[f"{who}_growth_kib"] = (after[who].resident_bytes - before[who].resident_bytes) / 1024
        figures[f"{who}_growth_descriptors"] = after[who].descriptors - before[who].descriptors
    return figures


def _steps(step: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        step()


_MEMORY, _GROWTH = "memory", "growth"
_KINDS = {_MEMORY: _memory, _GROWTH: _growth}

if __name__ == "__main__":
    kind, target, pid, variant, size, count = sys.argv[1:]
    print(json.dumps(_KINDS[kind](ServerProcess(target, int(pid)), variant, int(size), int(count))))
