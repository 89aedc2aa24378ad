"""`make gpu`: the CUDA engine beside the copy speed of the same device. Unverified on a GPU.

Needs CuPy, NumPy, ml_dtypes and protobuf, and a CUDA device; installs nothing. Writes results/<device>.json.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import machine
import stepwire
from stepwire.codecs import BFLOAT16, FLOAT32
from stepwire_server import rules
from stepwire_server.engines import CudaEngine
from stepwire_server.engines.protocol import PARAM

_SIZES = (1_000_000, 32_000_000, 100_000_000)
_ROUNDS = 9
# Bytes of device memory that a step reads and writes a parameter: p, m and v both ways, the gradient, the answer.
_STATE_TRAFFIC = 24


def main() -> None:
    """Measure, print, and write the results file."""
    try:
        import cupy
    except ImportError as problem:
        sys.exit(f"no GPU benchmark: CuPy cannot be imported ({problem})")
    if not cupy.cuda.is_available():
        sys.exit("no GPU benchmark: CUDA sees no device")
    engine = CudaEngine(0, cupy)
    results: dict[str, Any] = {"machine": machine.describe(), "device": _describe(cupy, engine)}
    for size in _SIZES:
        copy = _copy_rate(cupy, size)
        for dtype in (FLOAT32, BFLOAT16):
            results[f"{size}_{dtype.name}"] = _step(cupy, engine, size, dtype, copy)
    text = json.dumps(results, indent=2)
    print(text)
    folder = pathlib.Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    name = results["device"]["name"].lower().replace(" ", "-")
    (folder / f"{name}.json").write_text(text + "\n")


def _describe(cupy: Any, engine: CudaEngine) -> dict[str, str]:
    runtime = cupy.cuda.runtime
    return {
        "name": engine.device.description,
        "memory_bytes": str(engine.device.memory_bytes),
        "driver": str(runtime.driverGetVersion()),
        "runtime": str(runtime.runtimeGetVersion()),
        "cupy": cupy.__version__,
    }


def _step(cupy: Any, engine: CudaEngine, size: int, dtype: np.dtype[Any], copy_rate: float) -> dict[str, float]:
    """The engine's pass with no answer (all on the device), and with one (over the bus)."""
    optimizer = stepwire.Adam()
    hyper = optimizer.hyperparameters()
    rule = rules.rule_for(optimizer, hyper)
    state = engine.allocate((PARAM, *rules.slots_for(optimizer)), size)
    payload = np.full(size, 0.01, dtype)
    gradient, out, scalars = state.stage(payload), np.empty(size, dtype), rule.scalars(hyper, 1)
    on_device = _seconds(cupy, lambda: state.update(rule, scalars, 0, gradient, 0, size, None))
    whole = _seconds(cupy, lambda: state.update(rule, scalars, 0, state.stage(payload), 0, size, out))
    state.close()
    rate = size * (_STATE_TRAFFIC + dtype.itemsize) / on_device
    return {
        "step_ms": on_device * 1e3,
        "step_with_transfers_ms": whole * 1e3,
        "bytes_per_second": rate,
        "fraction_of_copy": rate / copy_rate,
    }


def _copy_rate(cupy: Any, size: int) -> float:
    """Bytes a second of a device-to-device copy, read and written counted."""
    source, target = cupy.zeros(size, np.float32), cupy.empty(size, np.float32)
    return 2 * source.nbytes / _seconds(cupy, lambda: cupy.copyto(target, source))


def _seconds(cupy: Any, action: Callable[[], Any]) -> float:
    """Median seconds of an action on the device's own clock."""
    action()
    times = []
    for _ in range(_ROUNDS):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
