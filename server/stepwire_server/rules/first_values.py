"""The first parameters of a table that no client loads: numbers of a seed, the same on every server.

Output n = 1, 2, … of SplitMix64 for a seed s, all modulo 2⁶⁴:

    z ← s + n·0x9E3779B97F4A7C15
    z ← (z ⊕ (z >> 30))·0xBF58476D1CE4E5B9
    z ← (z ⊕ (z >> 27))·0x94D049BB133111EB
    z ← z ⊕ (z >> 31)

The row of an id has a seed of its own, output id + 1 for the table's seed, and its elements are those of a table of
this seed. So a row has the same values whenever it is made, and wherever it lies.

The upper 24 bits x of an output make a number of float32 without rounding, x / 2²³ − 1 in [−1, 1), and one product by
the bound.
Any element is computed by itself, so that no cut of the table changes one.

Source: Steele, Lea & Flood 2014, and the code of Vigna's splitmix64.c.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["uniform", "uniform_rows"]


def uniform(first: int, count: int, bound: float, seed: int) -> npt.NDArray[Any]:
    """Return elements `[first, first + count)` of a table, `(count,) float32`, uniform in [−bound, bound)."""
    return _scaled(_outputs(np.uint64(seed), np.arange(first + 1, first + count + 1, dtype=np.uint64)), bound)


def uniform_rows(ids: npt.NDArray[np.int64], width: int, bound: float, seed: int) -> npt.NDArray[Any]:
    """Return the rows of some ids, `(n, width) float32`, uniform in [−bound, bound)."""
    seeds = _outputs(np.uint64(seed), ids.astype(np.uint64) + np.uint64(1))
    return _scaled(_outputs(seeds[:, np.newaxis], np.arange(1, width + 1, dtype=np.uint64)), bound)


def _outputs(seed: Any, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return outputs of SplitMix64, from 1, by their numbers."""
    with np.errstate(over="ignore"):
        z: npt.NDArray[np.uint64] = seed + numbers * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _scaled(outputs: npt.NDArray[np.uint64], bound: float) -> npt.NDArray[Any]:
    units = (outputs >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return units * np.float32(bound)
