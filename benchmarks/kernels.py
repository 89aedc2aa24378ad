"""The CPU engine's pass beside `torch.optim.Adam` and a plain copy: one process, alternating rounds.

torch is measured if it is installed (the goals are for 2.13.0); the other figures do not need torch.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from contest import ratio
from stepwire.optimizers import Adam
from stepwire.wire.dtypes import BFLOAT16, FLOAT32
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.engines.protocol import PARAM, Pass
from stepwire_server.rules import Precision, Recipe, rule_for

__all__ = ["kernels", "many_small"]

Actions = dict[str, Callable[[], Any]]
# After a step of torch's, its threads wait for the next one on all cores for a while; nobody else shall pay for that.
_PAUSE_SECONDS = 0.02
_RULE = rule_for(Adam(), False)[0]
_SCALARS = (1.0, 1.0, *_RULE.scalars(Adam().hyperparameters(), 10))


def kernels(*, sizes: tuple[int, ...], threads: tuple[int, ...] = (1, 2), rounds: int = 9) -> dict[str, Any]:
    """Time one step of every kind at every size and number of threads."""
    figures: dict[str, Any] = {}
    for size in sizes:
        for count in threads:
            for name, value in _at(size, count, rounds).items():
                figures[f"{name} {size // 1_000_000}M {count}t"] = value
    return figures


def many_small(*, tensors: int = 300, size: int = 1000, rounds: int = 200) -> dict[str, Any]:
    """Time a step of many small tensors: one kernel call here, and torch's foreach and fused forms."""
    engine = CpuEngine(2)
    gradient = np.random.default_rng(0).standard_normal(tensors * size, np.float32)
    actions: Actions = {"stepwire": _step(engine, gradient, FLOAT32, None)}
    if (torch := _torch(2)) is not None:
        for form in ("foreach", "fused"):
            actions[form] = _torch_step(torch, np.split(gradient, tensors), **{form: True})
    times = _rounds(actions, rounds)
    engine.close()
    figures = {f"{name}_us": statistics.median(values) * 1e6 for name, values in times.items()}
    return figures | {f"ratio_{name}": ratio(times, "stepwire", name) for name in times if name != "stepwire"}


def _at(size: int, threads: int, rounds: int) -> dict[str, float]:
    gradient = np.random.default_rng(0).standard_normal(size, np.float32)
    halves = gradient.astype(BFLOAT16)
    engine, numpy_engine = CpuEngine(threads), CpuEngine(threads, use_numba=False)
    target = np.empty_like(gradient)
    actions: Actions = {
        "copy": lambda: np.copyto(target, gradient),
        "float32": _step(engine, gradient, None, None),
        "telemetry": _step(engine, gradient, None, None, measures=True),
        "answered": _step(engine, gradient, FLOAT32, None),
        "bfloat16": _step(engine, halves, BFLOAT16, None),
        "bfloat16_moments": _step(engine, gradient, FLOAT32, Precision.BFLOAT16),
        "int8_moments": _step(engine, gradient, FLOAT32, Precision.INT8),
        "numpy": _step(numpy_engine, gradient, None, None),
    }
    if (torch := _torch(threads)) is not None:
        actions["torch_fused"] = _torch_step(torch, [gradient], fused=True)
        actions["torch_casts"] = _torch_casts(torch, gradient)
        actions["torch_default"] = _torch_step(torch, [gradient], foreach=False, fused=False)
    times = _rounds(actions, rounds)
    engine.close()
    numpy_engine.close()
    actions.clear()
    gc.collect()
    figures = {f"{name}_ms": statistics.median(values) * 1e3 for name, values in times.items()}
    return figures | _ratios(times)


def _ratios(times: dict[str, list[float]]) -> dict[str, float]:
    figures = {
        "ratio_telemetry": ratio(times, "telemetry", "float32"),
        "ratio_bfloat16_moments": ratio(times, "bfloat16_moments", "answered"),
        "ratio_int8": ratio(times, "int8_moments", "answered"),
        "ratio_copies": ratio(times, "float32", "copy"),
    }
    if "torch_fused" in times:
        times["fused_and_casts"] = [a + b for a, b in zip(times["torch_fused"], times["torch_casts"], strict=True)]
        figures["ratio_fused"] = ratio(times, "float32", "torch_fused")
        figures["ratio_fused_and_casts"] = ratio(times, "bfloat16", "fused_and_casts")
        figures["ratio_numpy"] = ratio(times, "numpy", "torch_default")
    return figures


def _rounds(actions: Actions, rounds: int) -> dict[str, list[float]]:
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            time.sleep(_PAUSE_SECONDS)
            action()
            started = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - started)
    return times


def _step(
    engine: CpuEngine,
    gradient: np.ndarray[Any, Any],
    reply: np.dtype[Any] | None,
    precision: Precision | None,
    *,
    measures: bool = False,
) -> Callable[[], Any]:
    """Return one step of the whole space; moments start as the step leaves them."""
    size, held = len(gradient), precision or Precision.FLOAT32
    recipe = Recipe(_RULE, measures=measures, precision=held)
    state = engine.allocate({PARAM: Precision.FLOAT32, **dict.fromkeys(_RULE.slots, held)}, size)
    staged, step = state.receive().put(0, gradient), Pass(recipe, _SCALARS, seed=1)
    out = None if reply is None else np.empty(size, reply)
    return lambda: state.update(step, 0, staged, 0, size, out).wait()


def _torch(threads: int) -> Any:
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    return torch


def _torch_step(torch: Any, gradients: list[np.ndarray[Any, Any]], **form: bool) -> Callable[[], Any]:
    parameters = [torch.nn.Parameter(torch.zeros(len(gradient))) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.from_numpy(np.ascontiguousarray(gradient))
    return torch.optim.Adam(parameters, **form).step  # type: ignore[no-any-return]


def _torch_casts(torch: Any, gradient: np.ndarray[Any, Any]) -> Callable[[], Any]:
    """Return the casts that torch needs where gradients come and parameters go as bfloat16; nothing is allocated."""
    parameters, gradients = torch.from_numpy(gradient.copy()), torch.from_numpy(gradient.copy())
    halves, reply = parameters.bfloat16(), parameters.bfloat16()
    return lambda: (gradients.copy_(halves), reply.copy_(parameters))
