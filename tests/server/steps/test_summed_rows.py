"""Gradients of rows that come often: their exact sums, rounded once, whatever the order."""

from __future__ import annotations

import importlib.util
import itertools
from fractions import Fraction

import numpy as np
import pytest

from stepwire_server.engines.cpu import numpy_lines
from stepwire_server.engines.cpu.numpy_kernels import NumpyKernels
from stepwire_server.steps import summed_rows as module
from stepwire_server.steps.summed_rows import summed_rows


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum with the kernels of this machine, and with NumPy's, which get few numbers at a time."""
    if request.param == "numpy":
        monkeypatch.setattr(module, "host_kernels", NumpyKernels)
        monkeypatch.setattr(numpy_lines, "_AT_ONCE", 50)
    elif importlib.util.find_spec("numba") is None:
        pytest.skip("Numba is not installed")


def summed(rows: list[int], values: np.ndarray) -> tuple[list[int], np.ndarray]:
    found, sums = summed_rows(np.array(rows, np.int64), values)
    return found.tolist(), sums


def nearest(numbers: list[float]) -> np.float32:
    """Round an exact sum once: the float32 nearest to it, and of two the even one."""
    exact = sum(map(Fraction, numbers), Fraction(0))
    near = np.float32(float(exact))
    around = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    return min(around, key=lambda each: (abs(Fraction(float(each)) - exact), int(each.view(np.uint32)) & 1))


@pytest.mark.parametrize("order", list(itertools.permutations([1e8, 1.0, -1e8, 1.0])))
def test_no_order_loses_a_digit(order: tuple[float, ...]) -> None:
    rows, sums = summed([7, 7, 7, 7], np.array(order, np.float32)[:, np.newaxis])
    assert (rows, sums.tolist()) == ([7], [[2.0]])


def test_rows_that_rise_are_returned_as_they_are() -> None:
    values = np.ones((3, 2), np.float32)
    assert summed([0, 4, 9], values)[1] is values


def test_rows_come_back_rising_and_once() -> None:
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    rows, sums = summed([3, 0, 3, 9, 0], values)
    assert rows == [0, 3, 9]
    assert sums.tolist() == [[2 + 8, 3 + 9], [0 + 4, 1 + 5], [6, 7]]


@pytest.mark.parametrize("spread", [1, 60, 250])
def test_sums_are_exact_and_rounded_once(spread: int) -> None:
    """Up to all of float32's range, subnormal numbers included, in a row."""
    rng = np.random.default_rng(spread)
    rows = rng.integers(0, 6, 90)
    values = (rng.standard_normal((90, 3)) * 2.0 ** rng.integers(-spread // 2 - 20, spread // 2, (90, 3))).astype(
        np.float32
    )
    found, sums = summed(rows.tolist(), values)
    for place, row in enumerate(found):
        for column in range(3):
            assert sums[place, column] == nearest(values[rows == row, column].tolist())


@pytest.mark.parametrize("spread", [60, 250])
def test_a_row_that_comes_often_has_an_exact_sum(spread: int) -> None:
    """More numbers than are added together, of all sizes; half of them take the others away again but for a rest."""
    rng = np.random.default_rng(spread)
    half = (rng.standard_normal((400, 2)) * 2.0 ** rng.integers(-spread // 2 - 20, spread // 2, (400, 2))).astype(
        np.float32
    )
    values = np.concatenate([half, -half[::-1], half[:1] * np.float32(2.0**-20)])
    _, sums = summed([5] * len(values), values)
    assert sums[0].tolist() == [nearest(values[:, column].tolist()) for column in range(2)]


def test_a_sum_beside_the_middle_of_two_numbers_is_not_rounded_twice() -> None:
    """1 + 2⁻²⁴ is a middle, and 2⁻⁶⁰ above it is nearer to the upper one; float64 does not tell the two apart."""
    values = np.array([1.0, 2.0**-24, 2.0**-60], np.float32)[:, np.newaxis]
    assert summed([0, 0, 0], values)[1].tolist() == [[1.0 + 2.0**-23]]


@pytest.mark.parametrize(
    ("numbers", "total"),
    [
        ([np.inf, 1.0], np.inf),
        ([np.inf, -np.inf, 0.0], np.nan),
        ([np.nan, 3.0], np.nan),
        ([3e38, 3e38], np.inf),
        ([3e38, 3e38, -3e38], np.float32(3e38)),
    ],
)
def test_what_is_not_finite_stays_so(numbers: list[float], total: float) -> None:
    values = np.array(numbers, np.float32)[:, np.newaxis]
    for order in itertools.permutations(range(len(numbers))):
        np.testing.assert_array_equal(summed([1] * len(numbers), values[list(order)])[1], [[total]])


def test_one_row_may_come_very_often() -> None:
    rows = np.zeros(300_000, np.int64)
    rows[::1000] = np.arange(300)
    values = np.full((300_000, 8), np.float32(0.1))
    found, sums = summed(rows.tolist(), values)
    assert found == list(range(300))
    assert sums[0].tolist() == [np.float32(float(np.float32(0.1)) * 299_701)] * 8
    assert np.all(sums[1:] == np.float32(0.1))
