"""Norms that do not depend on how their elements were cut or added up, against fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.optimizers.norms import RELATIVE_ERROR, rounded_norm
from stepwire_server.rules.exact_norm import exact_sum_of_squares

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
LARGEST, LEAST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).smallest_subnormal)


def fraction_sum(values: np.ndarray) -> Fraction:
    return sum((Fraction(float(value)) ** 2 for value in values), Fraction(0))


def nearest_root(total: Fraction) -> float:
    """Return the root of a fraction, rounded to 24 bits, ties to even, by integers alone."""
    if total == 0:
        return 0.0
    exponent = 0
    while total * Fraction(4) ** exponent < 4**23:
        exponent += 1
    while total * Fraction(4) ** exponent >= 4**24:
        exponent -= 1
    scaled = total * Fraction(4) ** exponent  # its root lies in [2²³, 2²⁴)
    low = math.isqrt(scaled.numerator // scaled.denominator)
    middle = (Fraction(low) + Fraction(1, 2)) ** 2
    up = scaled > middle or (scaled == middle and low % 2 == 1)
    return float(Fraction(low + up) / Fraction(2) ** exponent)


def never() -> Fraction:
    raise AssertionError("asked for the exact sum")


def norm_of(values: np.ndarray) -> float:
    return rounded_norm(
        float(np.sum(values.astype(np.float64) ** 2)), lambda: exact_sum_of_squares([values.astype(np.float32)])
    )


# --- the exact sum --------------------------------------------------------------------------------------------


@given(st.lists(FLOATS, max_size=60))
def test_the_sum_is_exact(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert exact_sum_of_squares([array]) == fraction_sum(array)


@pytest.mark.parametrize(
    "values",
    [
        [LARGEST] * 3,
        [LEAST] * 5,
        [LARGEST, LEAST, 1.0, -1e-40, 2.0**-126, -LARGEST],
        [2.0**exponent for exponent in range(-149, 128)],
        [-0.0, 0.0],
        [],
    ],
)
def test_the_sum_is_exact_at_the_ends_of_float32(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert exact_sum_of_squares([array]) == fraction_sum(array)


def test_the_sum_is_exact_over_many_equal_exponents() -> None:
    """The most that a block can add up: every square has all its bits set in the upper half or in the lower."""
    for value in (LARGEST, 2.0 - 2.0**-23, 1.0 + 2.0**-23, (2.0**24 - 1) * LEAST):
        array = np.full(65_536 + 7, value, np.float32)
        assert exact_sum_of_squares([array]) == len(array) * Fraction(value) ** 2


def test_blocks_may_be_cut_anywhere() -> None:
    values = (np.random.default_rng(0).standard_normal(200_000) * 1e-3).astype(np.float32)
    whole = exact_sum_of_squares([values])
    assert exact_sum_of_squares([values[:1], values[1:70_000], values[70_000:70_000], values[70_000:]]) == whole
    assert exact_sum_of_squares(np.random.default_rng(1).permutation(values)[None]) == whole
    assert exact_sum_of_squares([]) == 0


# --- the norm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [0.0, math.inf])
def test_zero_and_infinity_stay(total: float) -> None:
    assert rounded_norm(total, never) == total


def test_nan_stays() -> None:
    assert math.isnan(rounded_norm(math.nan, never))


@given(st.lists(FLOATS, min_size=1, max_size=20), st.floats(-1.0, 1.0))
def test_the_norm_is_correctly_rounded_whatever_the_error_of_the_sum(values: list[float], error: float) -> None:
    array = np.array(values, np.float32)
    exact = exact_sum_of_squares([array])
    total = float(exact * (1 + Fraction(error) * Fraction(RELATIVE_ERROR)))
    assert rounded_norm(total, lambda: exact) == nearest_root(exact)


@given(st.integers(2**23, 2**24 - 1), st.integers(-140, 100), st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]))
def test_the_norm_is_right_next_to_every_tie(integer: int, exponent: int, error: float) -> None:
    """Roots exactly halfway between two numbers of 24 bits, and those a hair off, where the interval helps nobody."""
    middle = ((Fraction(integer) + Fraction(1, 2)) * Fraction(2) ** exponent) ** 2
    for exact in (middle, middle * (1 + Fraction(1, 2**80)), middle * (1 - Fraction(1, 2**80))):
        total = float(exact * (1 + Fraction(error) * Fraction(RELATIVE_ERROR)))
        assert rounded_norm(total, lambda exact=exact: exact) == nearest_root(exact)


@pytest.mark.parametrize(("integer", "even"), [(2**23, 2**23), (2**23 + 1, 2**23 + 2), (2**24 - 1, 2**24)])
def test_ties_go_to_the_even_neighbour(integer: int, even: int) -> None:
    tie = (Fraction(integer) + Fraction(1, 2)) ** 2
    assert rounded_norm(float(tie), lambda: tie) == even


def test_a_clear_case_needs_no_exact_sum() -> None:
    assert rounded_norm(25.0, never) == 5.0
    assert rounded_norm(2.0, never) == float(np.float32(math.sqrt(2.0)))


def test_exactness_is_rarely_needed() -> None:
    asked = []
    for total in np.random.default_rng(5).uniform(1.0, 4.0, 100_000):
        rounded_norm(float(total), lambda total=total: asked.append(total) or Fraction(total))
    assert len(asked) < 5


def test_a_norm_may_exceed_float32_and_keeps_24_bits() -> None:
    values = np.full(100, LARGEST, np.float32)
    assert norm_of(values) == 10 * LARGEST or norm_of(values) == nearest_root(fraction_sum(values))
    assert norm_of(np.full(4, LEAST, np.float32)) == 2 * LEAST


@given(
    st.lists(FLOATS, min_size=1, max_size=40),
    st.randoms(use_true_random=False),
    st.lists(st.integers(0, 40), max_size=6),
)
def test_no_order_and_no_partition_changes_the_norm(values: list[float], random, cuts: list[int]) -> None:
    expected = norm_of(np.array(values, np.float32))
    random.shuffle(values)
    array = np.array(values, np.float32)
    edges = [0, *sorted(cuts), len(array)]
    parts = [array[low:high] for low, high in zip(edges[:-1], edges[1:], strict=True)]
    # Parts overlap nowhere: cuts past the end leave empty ones.
    total = math.fsum(float(np.sum(part.astype(np.float64) ** 2)) for part in parts)
    assert rounded_norm(total, lambda: exact_sum_of_squares(parts)) == expected == nearest_root(fraction_sum(array))


def test_the_allowed_error_is_that_of_128_roundings() -> None:
    assert 128 * 2.0**-53 < RELATIVE_ERROR * (1 + 2.0**-40) and RELATIVE_ERROR == 2.0**-45
