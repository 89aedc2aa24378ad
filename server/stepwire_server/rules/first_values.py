"""The first parameters of a table that no client loads: numbers of a seed, the same on every server.

Output n = 1, 2, … of SplitMix64 for a seed s, all modulo 2⁶⁴:

    z ← s + n·0x9E3779B97F4A7C15
    z ← (z ⊕ (z >> 30))·0xBF58476D1CE4E5B9
    z ← (z ⊕ (z >> 27))·0x94D049BB133111EB
    z ← z ⊕ (z >> 31)

Its upper 24 bits x make a number of float32 without rounding, x / 2²³ − 1 in [−1, 1), and one product by the bound.
Any element is computed by itself, so that no cut of the table changes one.

Source: Steele, Lea & Flood 2014, and the code of Vigna's splitmix64.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["uniform"]


def uniform(first: int, count: int, bound: float, seed: int) -> npt.NDArray[Any]:
    """Return elements `[first, first + count)` of a table, `(count,) float32`, uniform in [−bound, bound)."""
    outputs = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + outputs * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    units = (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return units * np.float32(bound)
