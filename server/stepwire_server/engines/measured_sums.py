"""Sums of squares for telemetry: about six digits, over all of float32's range.

Squares of float32 are beyond float32 from 1.8e19 on, and lose digits below 1e-19 until they are zero below 2.6e-23. So
a sum in float32 counts only within the bounds here, where no square has overflowed and those that lost digits do not
show. Everything else, a true 0 among it, is summed once more in float64, which has all squares of float32.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from stepwire_server.engines.protocol import HostArray

__all__ = ["TRUSTED_SUMS", "measured_sum"]

TRUSTED_SUMS: Final = (2.0**-100, 2.0**127)
"""The least and the largest sum in float32 that counts, of at most 65,536 squares."""

_BLOCK: Final = 4096
"""The squares that are added in float32. Equal ones are rounded alike, so 65,536 of them lose the sixth digit."""


def measured_sum(values: HostArray) -> float:
    """Sum the squares of float32 elements `(n,)`, at most 65,536."""
    low, high = TRUSTED_SUMS
    quick = 0.0
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        quick += float(np.dot(block, block))
    if low <= quick <= high:
        return quick
    wide = values.astype(np.float64)
    return float(np.dot(wide, wide))
