"""Workers' gradients as they are staged, reduced to one by each reduction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.errors import ResourceExhaustedError
from stepwire.layout import TensorSpec, place
from stepwire.wire.int8_blocks import INT8, decode_blocks, encode_blocks
from stepwire_server.aggregation.accumulator import Accumulator, accumulator_bytes
from stepwire_server.aggregation.reduction import Reduction
from stepwire_server.aggregation.robust import (
    RobustReduction,
    median,
    norm_bounded_mean,
    robust_bytes,
    trimmed_mean,
)
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines import CpuEngine
from stepwire_server.records.tensor_selection import TensorSelection
from stepwire_server.steps.gradient import StagedGradient

LAYOUT = place([TensorSpec("a", (30, 10)), TensorSpec("b", (40,)), TensorSpec("c", (500,), 1)], 2)
SIZE = LAYOUT.size
ELEMENTS = np.zeros(SIZE, bool)
for tensor in LAYOUT.tensors:
    ELEMENTS[tensor.offset : tensor.end] = True
FLOAT32 = np.dtype(np.float32)
DTYPES = [FLOAT32, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), INT8]


@pytest.fixture(scope="module", params=["numba", "numpy"])
def engine(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    engine = CpuEngine(threads=2, use_numba=request.param == "numba")
    yield engine
    engine.close()


def staged(
    engine: CpuEngine, values: np.ndarray, dtype: np.dtype[Any] = FLOAT32, absent: Iterable[int] = (), cut: int = 256
) -> StagedGradient:
    """Stage a gradient of SIZE elements in chunks of `cut` elements, the last first."""
    budget = MemoryBudget(1 << 30)
    selection = TensorSelection(LAYOUT, frozenset(absent))
    gradient = StagedGradient(dtype, selection, engine.staging(SIZE), budget.reserve(8 * SIZE, "test"), unscale=1.0)
    for low in reversed(range(0, SIZE, cut)):
        part = values[low : low + cut]
        if dtype == INT8:
            payload = np.empty(-(-len(part) // 256), INT8)
            encode_blocks(part, payload)
        else:
            payload = part.astype(dtype)
        gradient.add(low, len(part), payload.view(np.uint8).reshape(-1))
    gradient.complete()
    return gradient


def decoded(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Return the float32 that a dtype makes of values, and 0 between tensors."""
    if dtype == INT8:
        blocks = np.empty(-(-SIZE // 256), INT8)
        encode_blocks(values, blocks)
        values = decode_blocks(blocks, SIZE)
    return np.where(ELEMENTS, values.astype(dtype if dtype != INT8 else FLOAT32).astype(np.float32), np.float32(0.0))


def gradients_of(workers: int, seed: int = 0) -> np.ndarray:
    """Return gradients, `(workers, SIZE) float32`."""
    return np.random.default_rng(seed).standard_normal((workers, SIZE)).astype(np.float32)


def reduced(
    reduction: Reduction, gradients: Iterable[StagedGradient], divisor: float, factor: float = 1.0
) -> np.ndarray:
    """Add gradients, close them, and reduce them."""
    for gradient in gradients:
        reduction.add(gradient, factor)
        gradient.close()
    return reduction.reduced(divisor).copy()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16", "int8"])
def test_the_mean_of_three_workers_in_every_order(engine, dtype) -> None:
    values = gradients_of(3)
    total = Accumulator(engine.exact_sum(SIZE), LAYOUT)
    want = (sum(decoded(each, dtype).astype(np.longdouble) for each in values) / 3).astype(np.float32)
    for order in itertools.permutations(range(3)):
        total.clear()
        cuts = (256, 512, 1024)
        got = reduced(total, (staged(engine, values[index], dtype, cut=cuts[index]) for index in order), 3.0)
        assert got.tobytes() == want.tobytes()


def test_weights_are_factors_and_their_sum_the_divisor(engine) -> None:
    values, weights = gradients_of(3), (3.0, 5.0, 7.0)
    total = Accumulator(engine.exact_sum(SIZE), LAYOUT)
    for row, weight in zip(values, weights, strict=True):
        total.add(staged(engine, row), weight)
    exact = sum(
        decoded(row, FLOAT32).astype(np.longdouble) * weight for row, weight in zip(values, weights, strict=True)
    )
    assert total.reduced(15.0).tobytes() == (exact / 15).astype(np.float32).tobytes()


@pytest.mark.parametrize("kind", ["mean", "median"])
def test_what_a_worker_does_not_send_counts_as_zero(engine, kind) -> None:
    """Chunks bring elements of absent tensors too, which are ignored; the row of an earlier round does not show."""
    values = gradients_of(3)
    reduction: Reduction = Accumulator(engine.exact_sum(SIZE), LAYOUT)
    if kind == "median":
        reduction = RobustReduction(engine.gradient_rows(SIZE, 3), median)
    reduced(reduction, (staged(engine, row) for row in values), 3.0)
    reduction.clear()
    absent = [(0,), (1, 2), ()]
    got = reduced(reduction, (staged(engine, row, absent=out) for row, out in zip(values, absent, strict=True)), 3.0)
    counted = np.array([decoded(row, FLOAT32) for row in values])
    for row, out in zip(counted, absent, strict=True):
        for index in out:
            row[LAYOUT.tensors[index].offset : LAYOUT.tensors[index].end] = 0.0
    want = np.median(counted, axis=0) if kind == "median" else counted.astype(np.longdouble).sum(axis=0) / 3
    assert np.array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 8])
def test_the_median(engine, workers) -> None:
    values = gradients_of(workers)
    counted = np.array([decoded(row, FLOAT32) for row in values])
    want = np.median(counted.astype(np.float64), axis=0).astype(np.float32)
    for order in (1, -1):
        reduction = RobustReduction(engine.gradient_rows(SIZE, workers), median)
        assert np.array_equal(reduced(reduction, (staged(engine, row) for row in values[::order]), 1.0), want)


@pytest.mark.parametrize(("workers", "trim", "left_out"), [(8, 2, 2), (5, 1, 1), (5, 0, 0), (3, 4, 1), (4, 2, 1)])
def test_the_trimmed_mean(engine, workers, trim, left_out) -> None:
    values = gradients_of(workers)
    values[0] *= 1e30
    ranked = np.sort(np.array([decoded(row, FLOAT32) for row in values]), axis=0)[left_out : workers - left_out]
    want = (ranked.astype(np.longdouble).sum(axis=0) / len(ranked)).astype(np.float32)
    reduction = RobustReduction(engine.gradient_rows(SIZE, workers), trimmed_mean(trim))
    assert np.array_equal(reduced(reduction, (staged(engine, row) for row in values), 1.0), want)


@pytest.mark.parametrize("bound", [None, 5.0, 1e9])
def test_the_norm_bounded_mean(engine, bound) -> None:
    values = gradients_of(4) * np.array([[1.0], [0.01], [50.0], [2.0]], np.float32)
    counted = np.array([decoded(row, FLOAT32) for row in values])
    norms = np.sqrt((counted.astype(np.longdouble) ** 2).sum(axis=1)).astype(np.float32).astype(np.float64)
    limit = bound or (sorted(norms)[1] + sorted(norms)[2]) / 2
    factors = np.minimum(limit / norms, 1.0).astype(np.float32)
    want = ((counted * factors[:, None]).astype(np.longdouble).sum(axis=0) / 4).astype(np.float32)
    for order in (1, -1):
        reduction = RobustReduction(engine.gradient_rows(SIZE, 4), norm_bounded_mean(bound))
        got = reduced(reduction, (staged(engine, row) for row in values[::order]), 4.0)
        assert np.array_equal(got, want)
        assert bound == 1e9 or np.linalg.norm(got) <= limit * 1.000001


def test_one_bad_worker_of_five_does_not_move_the_median_far(engine) -> None:
    values = gradients_of(5)
    values[3] = 1e38
    reduction = RobustReduction(engine.gradient_rows(SIZE, 5), median)
    got = reduced(reduction, (staged(engine, row) for row in values), 5.0)
    honest = np.array([decoded(row, FLOAT32) for index, row in enumerate(values) if index != 3])
    assert (honest.min(axis=0) <= got).all() and (got <= honest.max(axis=0)).all()


def test_the_factor_is_multiplied_in(engine) -> None:
    values = gradients_of(2)
    reduction = RobustReduction(engine.gradient_rows(SIZE, 2), median)
    got = reduced(reduction, (staged(engine, row) for row in values), 1.0, factor=0.25)
    want = np.median(np.array([decoded(row, FLOAT32) for row in values], np.float64), axis=0) / 4
    assert np.array_equal(got, want.astype(np.float32))


def test_a_round_without_gradients_has_no_median(engine) -> None:
    with pytest.raises(ValueError, match="no gradient was added"):
        RobustReduction(engine.gradient_rows(SIZE, 2), median).reduced(1.0)


def test_nan_of_a_worker_is_in_the_mean(engine) -> None:
    values = gradients_of(2)
    values[0, 5] = math.nan
    got = reduced(Accumulator(engine.exact_sum(SIZE), LAYOUT), (staged(engine, row) for row in values), 2.0)
    assert np.flatnonzero(np.isnan(got)).tolist() == [5]


def test_bytes_are_those_that_are_held(engine) -> None:
    total, rows = Accumulator(engine.exact_sum(SIZE), LAYOUT), RobustReduction(engine.gradient_rows(SIZE, 5), median)
    assert total.nbytes == 8 * SIZE <= accumulator_bytes(SIZE) <= accumulator_bytes(SIZE, whole_factors=False)
    assert rows.nbytes == robust_bytes(SIZE, 5)
    for reduction in (total, rows):
        reduction.close()
        reduction.close()
        assert reduction.nbytes == 0


def test_no_memory_for_errors_is_told(engine, monkeypatch) -> None:
    total = Accumulator(engine.exact_sum(SIZE), LAYOUT)

    def full(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("stepwire_server.engines.cpu.exact_sum.ExactSum.add", full)
    with pytest.raises(ResourceExhaustedError, match="rounding errors"):
        total.add(staged(engine, gradients_of(1)[0]), 1.0)
