"""Gradients of rows that come often: added up exactly, and rounded once to float32, whatever their order.

Rows are sorted once. A row that came once is itself. The others are added in float64, which is exact for a sum of n
numbers if the digits of the largest sum and of the smallest number are together within 53 bits:

    n · largest ≤ 2⁵³ · 2⁻²⁴ · smallest        2⁻²⁴·x is at most the last digit of a float32 x

Where that is not so, one element's numbers are added as integers would be (`math.fsum`), and the sum is rounded to odd
before it is rounded to float32 (Boldo & Melquiond 2008): see `engines.exact_scalars`. Gradients hardly ever need it.
NaN, and Inf of both signs, make NaN in any order.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from stepwire_server.engines.protocol import HostArray

__all__ = ["summed_rows"]

_BATCH: Final = 1 << 20
"""The elements that are added at a time, in a few arrays of float64."""

_EXACT: Final = 2.0**29


def summed_rows(rows: HostArray, values: HostArray) -> tuple[HostArray, HostArray]:
    """Return each row once, rising, with the exact sum of its gradients.

    Args:
        rows: the rows in the order in which they came, `(k,) int64`.
        values: their gradients, `(k, width) float32`; perhaps returned as they are.

    Returns:
        The rows, `(n,) int64`, and the sums, `(n, width) float32`, contiguous.
    """
    if np.all(rows[1:] > rows[:-1]):
        return rows, values
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    if len(starts) == len(rows):
        return ordered, values[order]
    sums, counts = values[order[starts]], np.diff(starts, append=len(rows))
    for part in _parts(np.flatnonzero(counts > 1), counts, values.shape[1]):
        _add_up(part, starts, counts, (order, values, sums))
    return ordered[starts], sums


def _parts(repeated: HostArray, counts: HostArray, width: int) -> list[HostArray]:
    """Cut the rows that came often into parts of about a batch, a row of more being alone."""
    elements = np.cumsum(counts[repeated]) * width
    return np.split(repeated, np.flatnonzero(np.diff(elements // _BATCH)) + 1) if len(repeated) else []


def _add_up(
    part: HostArray, starts: HostArray, counts: HostArray, arrays: tuple[HostArray, HostArray, HostArray]
) -> None:
    """Write the sums of some rows, by their places in `starts`, into the last array."""
    order, values, sums = arrays
    own = counts[part]
    firsts = np.concatenate([[0], np.cumsum(own)[:-1]])
    entries = order[np.repeat(starts[part] - firsts, own) + np.arange(own.sum())]
    columns = max(_BATCH // len(entries), 1)
    for low in range(0, values.shape[1], columns):
        sums[part, low : low + columns] = _exact_sums(values[entries, low : low + columns], firsts, own)


def _exact_sums(values: HostArray, firsts: HostArray, counts: HostArray) -> HostArray:
    """Return the sums of neighbouring lines of `values`, each rounded once: `(len(firsts), columns) float32`."""
    with np.errstate(all="ignore"):
        wide = values.astype(np.float64)
        totals = np.add.reduceat(wide, firsts, axis=0)
        np.abs(wide, out=wide)
        largest = np.maximum.reduceat(wide, firsts, axis=0)
        wide[wide == 0.0] = np.inf
        smallest = np.minimum.reduceat(wide, firsts, axis=0)
        exact = (counts[:, np.newaxis] * largest <= _EXACT * smallest) & np.isfinite(largest)
        sums: HostArray = totals.astype(np.float32)
    for row, column in np.argwhere(~exact & np.isfinite(largest)).tolist():
        sums[row, column] = _rounded_once(values[firsts[row] : firsts[row] + counts[row], column])
    return sums


def _rounded_once(values: HostArray) -> np.float32:
    """Return the sum of finite numbers, rounded once."""
    numbers = values.tolist()
    total = math.fsum(numbers)
    rest = math.fsum([*numbers, -total])
    odd = np.float64(total)
    if rest and not odd.view(np.int64) & 1:
        odd = np.nextafter(odd, np.float64(math.copysign(math.inf, rest)))
    with np.errstate(over="ignore"):
        return np.float32(odd)
