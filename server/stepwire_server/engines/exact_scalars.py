"""Float64 arithmetic that loses nothing: the error of a sum, the rest of a quotient, and rounding once.

A sum's rounding error is a float64 (Knuth's TwoSum), and so is the rest of a rounded quotient, total − quotient ·
divisor. Dekker's product finds that rest with Veltkamp's halves and without a fused multiply-add.

Rounding to float64 and then to float32 is rounding twice: a number just beside the middle of two float32 may become
that middle. Rounding to odd avoids it (Boldo & Melquiond 2008). An inexact result becomes that of its two neighbours
whose last bit is 1, which no middle of two float32 has. So every later comparison with a middle is that of the number
itself.

`two_sum` and `rest_of` are the same for NumPy's arrays. The others are for Numba alone, and `numpy_exact` has NumPy's.
"""

from __future__ import annotations

from typing import Any

from numpy import float32, float64, int64, uint32

from stepwire_server.engines.scalar_codecs import as_float

__all__ = ["finite_two_sum", "float32_of", "odd", "odd_quotient", "rest_of", "two_sum"]


def two_sum(left: Any, right: Any) -> Any:
    """Return the sum and its error, both float64, which together are left + right; NaN for that of Inf and NaN."""
    total = left + right
    added = total - left
    return total, (left - (total - added)) + (right - added)


def finite_two_sum(left: Any, right: Any) -> Any:
    """Return `two_sum`, with an error of 0 where the sum is Inf or NaN."""
    total, error = two_sum(left, right)
    return total, error if error == error else 0.0


def upper_half(value: Any) -> Any:
    """Return the 26 upper bits of a float64."""
    scaled_up = value * 134217729.0
    return scaled_up - (scaled_up - value)


def rest_of(total: Any, quotient: Any, divisor: Any) -> Any:
    """Return total − quotient · divisor exactly, for the quotient that is rounded to float64."""
    product = quotient * divisor
    quotient_upper = upper_half(quotient)
    divisor_upper = upper_half(divisor)
    quotient_lower = quotient - quotient_upper
    divisor_lower = divisor - divisor_upper
    error = quotient_upper * divisor_upper - product
    error = error + quotient_upper * divisor_lower + quotient_lower * divisor_upper
    return (total - product) - (error + quotient_lower * divisor_lower)


def odd(value: Any, error: Any) -> Any:
    """Round value + error to odd, where value is that sum rounded to nearest; only the sign of the error counts."""
    bits = float64(value).view(int64)
    away = int64(1) if (bits ^ float64(error).view(int64)) >= 0 else int64(-1)
    moved = ((error > 0.0) | (error < 0.0)) & ((bits & 1) == 0)
    return int64(bits + (away if moved else int64(0))).view(float64)


def odd_quotient(total: Any, divisor: Any) -> Any:
    """Round total / divisor to odd, for a divisor above 0."""
    quotient = total / divisor
    return odd(quotient, rest_of(total, quotient, divisor))


def float32_of(value: Any) -> Any:
    """Round to float32; every NaN becomes the same."""
    return as_float(uint32(0x7FC00000)) if value != value else float32(value)
