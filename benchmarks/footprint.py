"""The cost of a session before its first step: bytes of state a parameter, and seconds until its kernels are ready.

    python benchmarks/footprint.py [--quick]

Seconds are those of `CpuEngine.prepare` for a session's defaults (Adam with telemetry, float32 in and out), after the
import of Numba. Each time is measured in a process of its own, since it includes the start of Numba.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from stepwire.optimizers import Adam
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.engines.protocol import PARAM
from stepwire_server.rules import Precision, Recipe, rule_for

__all__ = ["footprint"]

_PREPARE = "--prepare"
_RULE = rule_for(Adam(), False)[0]


class Preparation(NamedTuple):
    """Seconds to make the kernels in one process.

    Attributes:
        fresh: by its first engine.
        warm: by a second engine, which finds Numba started and the first one's kernels in the cache.
    """

    fresh: float
    warm: float


def footprint(*, rounds: int = 5) -> dict[str, float]:
    """Return bytes at rest, and the median seconds to make kernels: compiled, from the cache, and with Numba warm."""
    compiled, cached = zip(*(_compiled_and_cached() for _ in range(rounds)), strict=True)
    return _bytes_at_rest() | {
        "first_kernels_s": statistics.median(one.fresh for one in compiled),
        "cached_kernels_s": statistics.median(one.fresh for one in cached),
        "warm_kernels_s": statistics.median(one.warm for one in cached),
    }


def prepare() -> Preparation:
    """Make the kernels twice in this process."""
    return Preparation(_prepare_seconds(), _prepare_seconds())


def main() -> None:
    """Print the figures; as a child, the seconds of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument(_PREPARE, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare:
        print(*prepare())
        return
    for name, value in footprint(rounds=1 if arguments.quick else 5).items():
        print(f"{name:<20} {value:.3f}")


def _bytes_at_rest(size: int = 100_000_000) -> dict[str, float]:
    """Return the engine's bytes a parameter for one tensor and Adam's moments, for each precision."""
    engine = CpuEngine(1, use_numba=False)
    figures = {}
    for precision in Precision:
        slots = {PARAM: Precision.FLOAT32, **dict.fromkeys(_RULE.slots, precision)}
        figures[f"bytes_{precision.value}"] = engine.state_bytes(slots, size) / size
    engine.close()
    return figures


def _compiled_and_cached() -> tuple[Preparation, Preparation]:
    """Make the kernels in a process with an empty cache, and in a process with the cache of the first."""
    with tempfile.TemporaryDirectory(prefix="stepwire-") as folder:
        return _in_child(folder), _in_child(folder)


def _in_child(cache: str) -> Preparation:
    environ = {**os.environ, "STEPWIRE_CACHE_DIR": cache}
    command = [sys.executable, __file__, _PREPARE]
    printed = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Preparation(*map(float, printed.split()))


def _prepare_seconds() -> float:
    engine = CpuEngine(1)
    started = time.perf_counter()
    engine.prepare(Recipe(_RULE, measures=True), FLOAT32, FLOAT32)
    seconds = time.perf_counter() - started
    engine.close()
    return seconds


if __name__ == "__main__":
    main()
