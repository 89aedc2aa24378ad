"""Updates with 8-bit moments beside those with float32: bounded where one value of a block outweighs the others.

A second moment that became zero beside a first moment that did not would make updates of thousands of learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest

from stepwire.optimizers import LAMB, Adam, AdamW, NAdam, Optimizer, RMSprop
from stepwire_server.engines import PARAM, CpuEngine, CudaEngine, Engine
from stepwire_server.engines.cuda.engine import CudaOptions
from stepwire_server.engines.protocol import Pass
from stepwire_server.rules import Precision, Recipe, rule_for

SIZE = 1000
LR = 1e-3
EIGHT = Precision.INT8
OUTLIER = 5
"""The element with another gradient, in the first of four blocks."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = CpuEngine(1, use_numba=False)
    yield engine
    engine.close()


@pytest.fixture(params=["numba", "cuda"])
def compiled(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Make the engines whose kernels are generated."""
    if request.param == "numba":
        pytest.importorskip("numba")
        engine: Engine = CpuEngine(1, use_numba=True)
    else:
        cupy = request.getfixturevalue("fake_cupy")(memory_bytes=4 << 20)
        engine = CudaEngine(0, cupy, CudaOptions(buffers=3, buffer_bytes=1 << 15, cells=32))
    yield engine
    engine.close()


class Run(NamedTuple):
    """The parameters after some steps, and the largest update of each, in learning rates."""

    parameters: np.ndarray
    updates: np.ndarray


Gradients = Callable[[int], np.ndarray]


def run(engine: Engine, optimizer: Optimizer, precision: Precision, gradients: Gradients, steps: int) -> Run:
    rule = rule_for(optimizer, bool(optimizer.hyperparameters().momentum))[0]
    recipe = Recipe(rule, precision=precision)
    state = engine.allocate({PARAM: Precision.FLOAT32, **dict.fromkeys(rule.slots, precision)}, SIZE)
    before, out, largest = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
    for t in range(1, steps + 1):
        scalars = rule.scalars(optimizer.hyperparameters(), t) + ((1.0,) if rule.direction is not None else ())
        received = state.receive()
        chunk = received.put(0, gradients(t).astype(np.float32))
        state.update(Pass(recipe, (1.0, 1.0, *scalars)), 0, chunk, 0, SIZE, out).wait()
        received.close()
        largest = np.maximum(largest, abs(out - before))
        before = out.copy()
    state.close()
    return Run(out, largest / np.float32(LR))


def outliers(t: int) -> np.ndarray:
    """One gradient of 1 a block, beside some of 1e-3."""
    scales = np.full(SIZE, 1e-3)
    scales[::256] = 1.0
    return np.random.default_rng(t).standard_normal(SIZE) * scales


def rare(t: int) -> np.ndarray:
    """Two of a hundred elements have a gradient, as in an embedding."""
    random = np.random.default_rng(t)
    return np.where(random.random(SIZE) < 0.02, random.standard_normal(SIZE), 0.0)


def zipf(t: int) -> np.ndarray:
    """Rows of 8 elements have a gradient the rarer, the further behind they lie, as words of a language."""
    random = np.random.default_rng(t)
    rows = random.random(SIZE // 8) < 1.0 / np.arange(1, SIZE // 8 + 1)
    return np.repeat(rows, 8) * random.standard_normal(SIZE) * 0.1


def overflowing(t: int) -> np.ndarray:
    """The square of one gradient overflows, and some elements never have a gradient."""
    values = np.random.default_rng(t).standard_normal(SIZE)
    values[300:] = 0.0
    values[OUTLIER] = 6e20 if t == 2 else values[OUTLIER]
    return values


RULES = [Adam(lr=LR), AdamW(lr=LR, formula="optax"), Adam(lr=LR, formula="keras"), NAdam(lr=LR), LAMB(lr=LR)]


@pytest.mark.parametrize("gradients", [outliers, rare, zipf])
@pytest.mark.parametrize("optimizer", RULES, ids=lambda rule: f"{rule.rule}-{rule.structure().formula}")
def test_updates_are_about_those_of_float32(engine: Engine, optimizer: Optimizer, gradients: Gradients) -> None:
    exact = run(engine, optimizer, Precision.FLOAT32, gradients, 60)
    coarse = run(engine, optimizer, EIGHT, gradients, 60)
    assert coarse.updates.max() < 2.8 * exact.updates.max() < 30
    distance = np.sqrt(np.mean((coarse.parameters - exact.parameters) ** 2))
    assert distance < 0.6 * np.sqrt(np.mean(exact.parameters**2))


@pytest.mark.parametrize("gradients", [outliers, rare, zipf, overflowing])
def test_updates_by_generated_kernels_are_those_of_numpy(
    engine: Engine, compiled: Engine, gradients: Gradients
) -> None:
    got, want = (run(each, RULES[0], EIGHT, gradients, 8) for each in (compiled, engine))
    np.testing.assert_array_equal(got.parameters, want.parameters)


@pytest.mark.parametrize("eps", [1e-8, 1e-20])
@pytest.mark.parametrize("large", [1.0, 1e10, 5e20])
@pytest.mark.parametrize("small", [1e-30, 1e-20, 1e-10])
def test_a_large_gradient_moves_no_other_element(engine: Engine, small: float, large: float, eps: float) -> None:
    """The squares of the smallest gradients underflow: a first moment that was rounded up would be divided by eps."""

    def gradients(t: int) -> np.ndarray:
        values = np.random.default_rng(t).standard_normal(SIZE) * small
        values[OUTLIER] = large if t == 2 else 0.0
        return values

    exact, coarse = (run(engine, Adam(lr=LR, eps=eps), each, gradients, 8) for each in (Precision.FLOAT32, EIGHT))
    others = np.arange(SIZE) != OUTLIER
    assert (coarse.updates[others] <= 4.0 * exact.updates[others].max()).all()
    assert coarse.updates[OUTLIER] <= 1.1 * exact.updates[OUTLIER]


@pytest.mark.parametrize("factor", [1.0, 1e5, 5e17])
@pytest.mark.parametrize("optimizer", [*RULES, RMSprop(lr=LR, momentum=0.9)], ids=lambda rule: rule.rule)
def test_a_second_moment_that_overflows_leaves_parameters_finite(
    engine: Engine, optimizer: Optimizer, factor: float
) -> None:
    """As with float32 moments, and with torch: m / Inf is 0."""

    def gradients(t: int) -> np.ndarray:
        return overflowing(t) * (factor if t == 2 else 1.0)

    exact, coarse = (run(engine, optimizer, each, gradients, 8) for each in (Precision.FLOAT32, EIGHT))
    assert np.isfinite(exact.parameters).all() and np.isfinite(coarse.parameters).all()
    assert coarse.updates.max() <= 2.8 * exact.updates.max()
    assert (coarse.updates[:300] > 0.0).all() and not coarse.parameters[300:].any()


@pytest.mark.parametrize("size", [1e-21, 1e-20, 1e-18, 1e-16])
def test_second_moments_that_are_subnormal_divide(engine: Engine, size: float) -> None:
    """Without eps, a zero in their place would make the update infinite."""
    optimizer = Adam(lr=LR, eps=0.0)
    exact, coarse = (
        run(engine, optimizer, each, lambda t: size * (1.0 + np.random.default_rng(t).random(SIZE)), 8)
        for each in (Precision.FLOAT32, EIGHT)
    )
    assert np.isfinite(exact.parameters).all() and np.isfinite(coarse.parameters).all()
    assert coarse.updates.max() <= 2.8 * exact.updates.max()
