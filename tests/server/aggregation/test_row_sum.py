"""The sum of several workers' rows has the bits that the sum of dense gradients has, whatever the factors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stepwire.layout import TensorSpec, place
from stepwire.optimizers.aggregation import Aggregation
from stepwire_server.aggregation.accumulator import Accumulator, accumulator_bytes
from stepwire_server.aggregation.reductions import reduction_bytes
from stepwire_server.aggregation.row_sum import RowSum
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.records.tensor_selection import TensorSelection
from stepwire_server.steps.row_gradients import RowGradients

ROWS, WIDTH = 7, 5
TABLE = place([TensorSpec("w", (300,)), TensorSpec("t", (ROWS, WIDTH), table="torch_sparse")], 1)
FLOAT32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def engine() -> CpuEngine:
    return CpuEngine(threads=1, use_numba=False)


def came(engine: CpuEngine, rows: Any, values: Any) -> RowGradients:
    """Make the rows of one worker, all of which have come."""
    table = TABLE.tables[1]
    found = RowGradients(
        {1: len(rows)}, TensorSelection(TABLE, frozenset()), FLOAT32, engine.staging(TABLE.size), keeps_entries=True
    )
    if len(rows):
        found.add(
            table.offset, values.size, rows.astype(np.uint64), np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        )
    found.complete()
    return found


def dense(engine: CpuEngine, parts: list[Any], factors: list[float], divisor: float) -> Any:
    """Add every entry up as a dense gradient of the table."""
    total, place_of = engine.exact_sum(ROWS * WIDTH), engine.staging(ROWS * WIDTH)
    for (rows, values), factor in zip(parts, factors, strict=True):
        for row, value in zip(rows.tolist(), values, strict=True):
            chunk = place_of.receive(WIDTH).put(0, value)
            total.add(row * WIDTH, chunk, 0, WIDTH, factor)
    return total.mean(divisor).copy().reshape(ROWS, WIDTH)


@pytest.mark.parametrize("spread", [0, 30, 120])
@pytest.mark.parametrize(
    ("factors", "divisor"),
    [([1.0, 1.0, 1.0], 3.0), ([1.0, 0.25, 1.0], 1.0), ([3.0, 5.0, 1001.0], 1009.0), ([0.3, 0.1, 1.7], 0.3 + 0.1 + 1.7)],
)
def test_rows_have_the_bits_of_a_dense_sum(
    engine: CpuEngine, spread: int, factors: list[float], divisor: float
) -> None:
    rng = np.random.default_rng(spread)
    for _ in range(6):
        parts = []
        for count in rng.integers(0, 30, 3).tolist():
            scale = 2.0 ** rng.integers(-spread - 1, spread + 1, (count, WIDTH))
            values = (rng.standard_normal((count, WIDTH)) * scale).astype(np.float32)
            parts.append((rng.integers(0, ROWS, count), values))
        expected = dense(engine, parts, factors, divisor)
        for order in itertools.permutations(range(3)):
            total = RowSum(TABLE)
            for worker in order:
                total.add(came(engine, *parts[worker]), factors[worker])
            (reduced,) = total.reduced(divisor)
            assert reduced.rows.tolist() == np.unique(np.concatenate([rows for rows, _ in parts])).tolist()
            assert reduced.values.tobytes() == expected[reduced.rows].tobytes()


def test_what_is_not_finite_stays_so(engine: CpuEngine) -> None:
    total = RowSum(TABLE)
    total.add(came(engine, np.array([2, 3]), np.array([[np.inf] * WIDTH, [np.nan] * WIDTH], np.float32)), 1.0)
    total.add(came(engine, np.array([2, 3]), np.array([[-np.inf] * WIDTH, [1.0] * WIDTH], np.float32)), 1.0)
    assert np.isnan(total.reduced(2.0)[0].values).all()


def test_a_round_holds_the_rows_that_came_and_no_table(engine: CpuEngine) -> None:
    large = place([TensorSpec("w", (300,)), TensorSpec("t", (1 << 40, 64), table="torch_sparse")], 1)
    total = Accumulator(engine.exact_sum(large.dense_size), large)
    assert total.nbytes <= 8 * 512 and accumulator_bytes(large.dense_size) < 1 << 13
    rows = RowSum(TABLE)
    rows.add(came(engine, np.arange(4), np.ones((4, WIDTH), np.float32)), 1.0)
    assert rows.nbytes == 4 * (WIDTH * 20 + 64)
    rows.clear()
    assert rows.nbytes == 0
    assert reduction_bytes(Aggregation(workers=4), large) < 1 << 13
