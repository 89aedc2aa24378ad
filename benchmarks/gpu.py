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
from stepwire_server.engines import CudaEngine
from stepwire_server.engines.protocol import PARAM, Pass
from stepwire_server.rules import Precision, Recipe, rule_for

_SIZES = (1_000_000, 32_000_000, 100_000_000)
_ROUNDS = 9
_ADAM, _DECAY = rule_for(stepwire.Adam(), momentum=False)
# The plain step, and what each option costs beside it.
_RECIPES = {
    "adam": Recipe(_ADAM),
    "adam_decay": Recipe(_ADAM, _DECAY),
    "adam_measures": Recipe(_ADAM, limits=True, measures=True),
    "adam_bfloat16_state": Recipe(_ADAM, precision=Precision.BFLOAT16),
    "adam_averages": Recipe(_ADAM, accumulates=True, averages=True),
}


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
            for name, recipe in _RECIPES.items():
                results[f"{size}_{dtype.name}_{name}"] = _step(cupy, engine, recipe, size, dtype, copy)
            results[f"{size}_{dtype.name}_norm"] = _norm(cupy, engine, size, dtype, copy)
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


def _step(
    cupy: Any, engine: CudaEngine, recipe: Recipe, size: int, dtype: np.dtype[Any], copy_rate: float
) -> dict[str, float]:
    """The engine's pass with no answer (all on the device), and with one (over the bus)."""
    held = {slot: recipe.precision if slot in recipe.rule.slots else Precision.FLOAT32 for slot in recipe.slots}
    slots = {PARAM: Precision.FLOAT32, **held}
    state, step = engine.allocate(slots, size), _pass(recipe)
    payload, out = np.full(size, 0.01, dtype), np.empty(size, dtype)
    gradient = state.stage(payload)
    on_device = _seconds(cupy, lambda: state.update(step, 0, gradient, 0, size, None))
    whole = _seconds(cupy, lambda: state.update(step, 0, state.stage(payload), 0, size, out))
    traffic = 2 * engine.state_bytes(slots, size) + size * dtype.itemsize
    state.close()
    return {
        "step_ms": on_device * 1e3,
        "step_with_transfers_ms": whole * 1e3,
        "bytes_per_second": traffic / on_device,
        "fraction_of_copy": traffic / on_device / copy_rate,
    }


def _pass(recipe: Recipe) -> Pass:
    """A first step whose treatment changes little."""
    numbers = {"factor": 1.0, "clip": 1.0, "limit": 1.0, "decay_scalar": 0.01, "average_rate": 0.01}
    hyper = stepwire.Adam().hyperparameters()
    numbers |= dict(zip(recipe.rule_scalars, recipe.rule.scalars(hyper, 1), strict=True))
    return Pass(recipe, tuple(numbers[name] for name in recipe.scalars))


def _norm(cupy: Any, engine: CudaEngine, size: int, dtype: np.dtype[Any], copy_rate: float) -> dict[str, float]:
    """The sum of squares that norm clipping and the check for odd values need."""
    state = engine.allocate({PARAM: Precision.FLOAT32}, size)
    gradient = state.stage(np.full(size, 0.01, dtype))
    seconds = _seconds(cupy, lambda: state.sum_of_squares(gradient, 0, size, 1.0))
    state.close()
    rate = size * dtype.itemsize / seconds
    return {"sum_ms": seconds * 1e3, "bytes_per_second": rate, "fraction_of_copy": rate / copy_rate}


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
