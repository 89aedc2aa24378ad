"""Sums of squares for telemetry: six digits, of equal elements too, over all of float32's range."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from stepwire_server.engines.measured_sums import measured_sum


@pytest.fixture(autouse=True)
def as_kernels_call_it() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 65_536])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-22, 0.1, 0.3, 0.7, 1e15, 3e38])
def test_equal_elements_whose_squares_are_rounded_alike_keep_six_digits(size: int, value: float) -> None:
    values = np.full(size, value, np.float32)
    assert measured_sum(values) == pytest.approx(size * float(values[0]) ** 2, rel=5e-6, abs=0.0)


def test_a_block_beyond_float32_is_summed_again() -> None:
    values = np.full(10_000, 0.5, np.float32)
    values[5000] = 1e30
    assert measured_sum(values) == pytest.approx(float(values[5000]) ** 2 + 9999 * 0.25, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    values = np.full(9000, 0.5, np.float32)
    values[8999] = value
    assert not math.isfinite(measured_sum(values))
