"""Telemetry's sums of squares over all of float32's range, on any engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import pytest

from stepwire_server.engines.protocol import PARAM, Engine, Pass
from stepwire_server.rules import ALL_RULES, Precision, Recipe

_RULE = next(rule for rule in ALL_RULES if rule.name == "sgd_momentum")
RECIPES: Final = [
    Recipe(_RULE, accumulates=True, limits=True, measures=True),
    Recipe(_RULE, accumulates=True, limits=True, measures=True, precision=Precision.INT8),
]
"""Recipes whose update is the sum of the gradients with its sign turned."""

_NUMBERS: Final = {"factor": 1.0, "clip": 1.0, "limit": 3e38, "momentum": 0.0, "rate": 1.0, "lr": 1.0}
SIZE: Final = 3 * 4096 + 5
SCALES: Final = (1.5e-45, 3e-40, 1e-30, 1e-23, 1e-20, 1e-16, 1e-7, 1.0, 1e10, 1e17, 1e19, 1e25, 1e37)


def _inputs() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield a name, parameters and a gradient each."""
    noise = np.random.default_rng(5).standard_normal(SIZE)
    zeros = np.zeros(SIZE)
    yield "nothing", zeros, zeros
    for scale in SCALES:
        yield f"from zeros by {scale}", zeros, noise * scale
        yield f"of {scale} by nothing", noise * scale, zeros
        yield f"of {scale} by a thousandth", noise * scale, noise[::-1] * (scale / 1000.0)
        block = np.where(np.arange(SIZE) < 4096, scale, 1e-3)
        yield f"by {scale}, then by 1e-3", noise, noise[::-1] * block
        yield f"by 1e-3, then by {scale}", noise, noise[::-1] * block[::-1]
    one = zeros.copy()
    one[SIZE - 2] = 1e-44
    yield "one element by a subnormal number", zeros, one


def check_range(engine: Engine, recipe: Recipe) -> None:
    """Compare the sums of one update with those of what it did, in float64."""
    held = {PARAM: Precision.FLOAT32, **dict.fromkeys(recipe.slots, Precision.FLOAT32)}
    held |= dict.fromkeys(recipe.rule.slots, recipe.precision)
    step = Pass(recipe, tuple(_NUMBERS[name] for name in recipe.scalars))
    for name, start, gradient in _inputs():
        before, sent = start.astype(np.float32), gradient.astype(np.float32)
        after, state = np.empty(SIZE, np.float32), engine.allocate(held, SIZE)
        state.write(PARAM, 0, before)
        received = state.receive()
        chunk = received.put(0, sent)
        state.accumulate(0, chunk, 0, SIZE, 1.0)
        sums = state.update(step, 0, chunk, 0, SIZE, None).wait()
        state.read(PARAM, 0, after).wait()
        received.close()
        state.close()
        found = {"update": after - before, "param": after, "gradient": sent + sent}
        for total, value in zip(recipe.sums, sums, strict=True):
            expected = float(np.sum(found[total].astype(np.float64) ** 2))
            assert value == pytest.approx(expected, rel=2e-5, abs=0.0), f"{total}: {name}"
