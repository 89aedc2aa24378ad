"""Sums of squares without any rounding, for norms that an engine's sum leaves in doubt; see `optimizers.norms`."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

__all__ = ["exact_sum_of_squares"]

_BLOCK = 65_536


def exact_sum_of_squares(blocks: Iterable[npt.NDArray[np.float32]]) -> Fraction:
    """Add the squares of float32 elements without any rounding.

    x = ±m·2ᵉ with an integer m < 2²⁴, so x² = m²·2²ᵉ with m² < 2⁴⁸. The squares of one exponent are added as two halves
    of 24 bits. Their sums over a block stay below 2⁵³ and are exact in float64. The exponents meet in Python's
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
