"""What `make gpu` measures on the device itself; `gpu_bus` has what crosses to the host.

A section returns its figures by name, None for what this machine cannot tell, or raises `Skipped`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gpu_clock import Actions, Gpu, Skipped, median, ratio, rounds
from gpu_torch import FusedAdam
from stepwire.optimizers import Adam
from stepwire.wire.dtypes import BFLOAT16, FLOAT32
from stepwire_server.engines import PARAM, CpuEngine
from stepwire_server.engines.cuda.ipc_memory import DeviceArray
from stepwire_server.engines.protocol import Pass
from stepwire_server.rules import Precision, Recipe, rule_for

__all__ = [
    "ADAM",
    "GUARD_ERROR",
    "Figures",
    "adam_pass",
    "adam_slots",
    "creation",
    "guard",
    "kernel",
    "many_small",
    "memory",
    "moments",
    "tiled",
]

Figures = dict[str, float | None]

ADAM = Recipe(rule_for(Adam(), momentum=False)[0])
GUARD_ERROR = 1e-6
_GUARD_STEPS = 10
_TELEMETRY = Recipe(ADAM.rule, measures=True)
_BFLOAT16 = Recipe(ADAM.rule, precision=Precision.BFLOAT16)
_INT8 = Recipe(ADAM.rule, precision=Precision.INT8)
# What a pass must move of each parameter: p, m and v read and written, and the gradient read.
_PASS_BYTES = 28
# A session, two gradients and a reply, both sides of a copy, and torch's tensors with their casts.
_KERNEL_BYTES = 12.1 + 6 + 2 + _PASS_BYTES + 16 + 4
# Three sessions with a reply each, and a gradient.
_MOMENTS_BYTES = 12.1 + 8.1 + 6.2 + 3 * 4 + 4
_ALIGNMENT = 1024


def adam_pass(recipe: Recipe, t: int = 10) -> Pass:
    """Return update `t` of Adam as torch has it by default."""
    return Pass(recipe, (1.0, 1.0, *recipe.rule.scalars(Adam().hyperparameters(), t)), seed=t)


def adam_slots(recipe: Recipe) -> dict[str, Precision]:
    """Return what a session with this recipe holds."""
    return {PARAM: Precision.FLOAT32, **dict.fromkeys(recipe.rule.slots, recipe.precision)}


def tiled(size: int, dtype: np.dtype[Any] = FLOAT32) -> np.ndarray[Any, Any]:
    """Return `(size,)` random numbers that repeat after a million."""
    tile = np.random.default_rng(0).standard_normal(min(size, 1 << 20), np.float32).astype(dtype)
    values = np.empty(size, dtype)
    for low in range(0, size, len(tile)):
        values[low : low + len(tile)] = tile[: size - low]
    return values


def guard(gpu: Gpu) -> Figures:
    """Compare ten steps with torch's, or, without torch, with NumPy's: the error, by the largest parameter."""
    size = gpu.extent.guard_size
    start, gradients = tiled(size) / 100, [tiled(size) * (1 + t % 3) for t in range(_GUARD_STEPS)]
    if gpu.torch is not None:
        expected = FusedAdam(gpu.torch, [size]).after(start, gradients)
    else:
        with contextlib.closing(CpuEngine(use_numba=False)) as engine:
            expected = _stepped(engine, start, gradients)
    error = np.abs(_stepped(gpu.engine, start, gradients) - expected).max() / np.abs(expected).max()
    return {"relative_error": float(error)}


def _stepped(engine: Any, start: np.ndarray[Any, Any], gradients: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    answer = np.empty_like(start)
    with contextlib.closing(engine.allocate(adam_slots(ADAM), len(start))) as state:
        state.write(PARAM, 0, start)
        for t, gradient in enumerate(gradients, 1):
            with contextlib.closing(state.receive()) as received:
                chunk = received.put(0, gradient)
                state.update(adam_pass(ADAM, t), 0, chunk, 0, len(start), answer).wait()
    return answer


# --- the pass over device memory ---------------------------------------------------------------------------------


def kernel(gpu: Gpu, size: int) -> Figures:
    """The fused pass, beside a plain copy of as many bytes and torch's: all in turn, on one clock."""
    gpu.require(f"a pass over {size:,}", device_bytes=_KERNEL_BYTES * size, host_bytes=4.1 * size)
    with gpu.session(adam_slots(ADAM), size) as state, _gradient(state, size) as floats:
        with _gradient(state, size, BFLOAT16) as halves:
            actions: Actions = {
                "copy": _copy(gpu, size),
                "adam": _pass(state, ADAM, floats),
                "telemetry": _pass(state, _TELEMETRY, floats),
                "bfloat16": _replying_pass(gpu, state, ADAM, halves),
                **_torch(gpu, size),
            }
            times = rounds(actions, gpu.clock.on_device, gpu.extent.rounds)
    figures: Figures = {f"{name}_ms": median(values) * 1e3 for name, values in times.items()}
    for name in ("copy", "adam", "telemetry"):
        figures[f"{name}_bytes_per_second"] = _PASS_BYTES * size / median(times[name])
    return figures | {
        "fraction_of_copy": ratio(times, "copy", "adam"),
        "telemetry_fraction_of_copy": ratio(times, "copy", "telemetry"),
        "ratio_torch": ratio(times, "adam", "torch"),
        "ratio_torch_bfloat16": ratio(times, "bfloat16", "torch_casts"),
    }


def moments(gpu: Gpu, size: int) -> Figures:
    """The fused pass with its reply, and the same with compact moments."""
    gpu.require(f"compact moments of {size:,}", device_bytes=_MOMENTS_BYTES * size, host_bytes=4.1 * size)
    recipes = {"float32": ADAM, "bfloat16": _BFLOAT16, "int8": _INT8}
    with contextlib.ExitStack() as stack:
        states = {name: stack.enter_context(gpu.session(adam_slots(each), size)) for name, each in recipes.items()}
        chunk = stack.enter_context(_gradient(states["float32"], size))
        actions = {name: _replying_pass(gpu, states[name], recipe, chunk) for name, recipe in recipes.items()}
        times = rounds(actions, gpu.clock.on_device, gpu.extent.rounds)
    figures: Figures = {f"{name}_ms": median(values) * 1e3 for name, values in times.items()}
    return figures | {f"ratio_{name}": ratio(times, name, "float32") for name in ("bfloat16", "int8")}


@contextlib.contextmanager
def _gradient(state: Any, size: int, dtype: np.dtype[Any] = FLOAT32) -> Iterator[Any]:
    """Lend a gradient on the device, in one chunk."""
    with contextlib.closing(state.receive()) as received:
        yield received.put(0, tiled(size, dtype))


def _copy(gpu: Gpu, size: int) -> Callable[[], None]:
    """Return a copy that reads and writes together what a pass must move."""
    device, nbytes = gpu.device, _PASS_BYTES // 2 * size
    source, target = device.allocate(nbytes), device.allocate(nbytes)

    def copy() -> None:
        with device.current():
            target.data.copy_from_device_async(source.data, nbytes, device.compute)

    return copy


def _pass(state: Any, recipe: Recipe, chunk: Any) -> Callable[[], Any]:
    step = adam_pass(recipe)
    return lambda: state.update(step, 0, chunk, 0, len(chunk), None)


def _replying_pass(gpu: Gpu, state: Any, recipe: Recipe, chunk: Any) -> Callable[[], Any]:
    """Return a pass that leaves its reply, in the gradient's dtype, on the device, as for a client on the same GPU."""
    step, size, dtype = adam_pass(recipe), len(chunk), chunk.dtype
    reply: Any = DeviceArray(gpu.device.allocate(size * dtype.itemsize), dtype)
    return lambda: state.update(step, 0, chunk, 0, size, reply)


def _torch(gpu: Gpu, size: int) -> dict[str, Callable[[], Any]]:
    if gpu.torch is None:
        return {}
    adam = FusedAdam(gpu.torch, [size], halves=True)
    return {"torch": adam.step, "torch_casts": adam.step_with_casts}


def many_small(gpu: Gpu) -> Figures:
    """Many small tensors in one session, which one call of a kernel steps: as long as whoever waits for it waits."""
    count, elements = gpu.extent.tensors
    size = count * -(-elements // _ALIGNMENT) * _ALIGNMENT
    with gpu.session(adam_slots(ADAM), size) as state, _gradient(state, size) as chunk:
        step = adam_pass(ADAM)

        def commit() -> None:
            state.sum_of_squares(chunk, 0, size, 1.0).wait()
            state.update(step, 0, chunk, 0, size, None)
            state.settle()

        actions: Actions = {"commit": commit}
        if gpu.torch is not None:
            actions = {"commit": commit, "torch": FusedAdam(gpu.torch, [elements] * count).step}
        times = rounds(actions, gpu.clock.by_the_wall, 10 * gpu.extent.rounds)
    figures: Figures = {f"{name}_us": median(values) * 1e6 for name, values in times.items()}
    return figures | {"ratio_torch": ratio(times, "commit", "torch")}


# --- what is held ------------------------------------------------------------------------------------------------


def memory(gpu: Gpu) -> Figures:
    """Device bytes a parameter, as the driver counts them, of the largest session that fits."""
    gpu.tidy()
    fitting = [size for size in gpu.extent.sizes if 17 * size < gpu.device.free_bytes()]
    if not fitting:
        raise Skipped("no size fits into device memory")
    size, before = fitting[-1], gpu.device.free_bytes()
    with gpu.session(adam_slots(ADAM), size) as state:
        gpu.engine.rest()
        resting = before - gpu.device.free_bytes()
        with contextlib.closing(state.receive()) as received:
            received.put(0, tiled(min(size, 1 << 20)))
            stepping = before - gpu.device.free_bytes()
    gpu.tidy()
    return {
        "parameters": float(size),
        "rest_bytes": resting / size,
        "step_bytes": stepping / size,
        "engine_bytes": float(gpu.engine.device.working_bytes),
        "left_bytes": float(before - gpu.device.free_bytes()),
    }


# --- kernels that are made ---------------------------------------------------------------------------------------

Child = Callable[[Mapping[str, str]], dict[str, float]]


def creation(child: Child | None = None) -> Figures:
    """Seconds until a new process has its kernels: compiled, and then from the files that the first one left."""
    child = child or _new_process
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "CUPY_CACHE_DIR": folder}
        cold, cached = child(environ), child(environ)
    return {"cold_seconds": cold["kernels"], "cached_seconds": cached["kernels"], "engine_seconds": cached["engine"]}


def _new_process(environ: Mapping[str, str]) -> dict[str, float]:
    path = pathlib.Path(__file__).with_name("gpu_creation.py")
    done = subprocess.run([sys.executable, path], env=environ, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise Skipped(f"a new process failed: {done.stderr.strip().splitlines()[-1]}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds
