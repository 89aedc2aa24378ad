"""Euclidean norms that do not depend on how their elements were cut or added up.

A norm decides how far a gradient is clipped, and so every bit of the next parameters. It must not change when a tensor
travels in other chunks, lies in another group, or is summed by another number of threads. So a norm here is the true
norm of its float32 elements, correctly rounded to float32's 24 bits (whatever the exponent).

The engine's sum in float64 is within 2⁻⁴⁵ of the truth. If both ends of that interval round to the same norm, it is the
one. That fails about once in a million norms; then the sum is taken exactly, in integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

__all__ = ["RELATIVE_ERROR", "exact_sum_of_squares", "rounded_norm"]

RELATIVE_ERROR = 2.0**-45
"""What an engine's sum of squares may be off by, relative to the sum: at most 128 roundings of 2⁻⁵³ each."""

_BLOCK = 65_536


def rounded_norm(total: float, exact: Callable[[], Fraction]) -> float:
    """Return the root of a sum of squares, correctly rounded to 24 bits.

    Args:
        total: the sum, within `RELATIVE_ERROR`; infinite or NaN is returned as it is.
        exact: returns the sum exactly; called only where it matters.
    """
    if not math.isfinite(total) or total == 0.0:
        return total
    low, high = (
        _rounded(math.sqrt(total * (1.0 - 2.0 * RELATIVE_ERROR))),
        _rounded(math.sqrt(total * (1.0 + 2.0 * RELATIVE_ERROR))),
    )
    return low if low == high else _nearer(exact(), low, high)


def exact_sum_of_squares(blocks: Iterable[npt.NDArray[np.float32]]) -> Fraction:
    """Add the squares of float32 elements without any rounding.

    x = ±m·2ᵉ with an integer m < 2²⁴, so x² = m²·2²ᵉ with m² < 2⁴⁸. The squares of one exponent are added as two
    halves of 24 bits, whose sums over a block stay below 2⁵³ and are exact in float64; the exponents meet in Python's
    integers.
    """
    total = Fraction(0)
    for values in blocks:
        for low in range(0, len(values), _BLOCK):
            mantissas, exponents = np.frexp(values[low : low + _BLOCK])
            integers = np.abs(np.ldexp(mantissas.astype(np.float64), 24)).astype(np.int64)
            squares, places = integers * integers, exponents.astype(np.int64) + 200
            upper = np.bincount(places, weights=(squares >> 24).astype(np.float64))
            lower = np.bincount(places, weights=(squares & 0xFFFFFF).astype(np.float64))
            for place in np.flatnonzero(upper + lower):
                whole = (int(upper[place]) << 24) + int(lower[place])
                total += Fraction(whole) * Fraction(2) ** (2 * (int(place) - 200 - 24))
    return total


def _rounded(value: float) -> float:
    """Round to 24 bits, ties to even."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2.0**24), exponent - 24)


def _nearer(total: Fraction, low: float, high: float) -> float:
    """Return which of two neighbours the root of `total` rounds to."""
    middle = (Fraction(low) + Fraction(high)) / 2
    if total != middle * middle:
        return low if total < middle * middle else high
    mantissa, _ = math.frexp(low)
    return low if int(mantissa * 2.0**24) % 2 == 0 else high
