"""Gradients of rows that come often: added up exactly, and rounded once to float32, whatever their order.

Rows are sorted once. A row that came once is itself. The others are added in float64, which is exact for a sum of n
numbers if the digits of the largest sum and of the smallest number are together within 53 bits. A number of b bits has
its last digit at 2⁻ᵇ of its size or above, and a float32 has 24:

    n · largest ≤ 2⁵³ · 2⁻ᵇ · smallest

Where that is not so, a kernel keeps the error of each sum, and adds the errors likewise (Shewchuk 1997). Its sums are
rounded to odd in float64 before they are rounded to float32 (Boldo & Melquiond 2008): see `engines.exact_scalars`. A
compiled kernel holds no lock of the interpreter, so a row that comes millions of times delays no other session.
NaN, and Inf of both signs, make NaN in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

from stepwire_server.engines.cpu.engine import host_kernels
from stepwire_server.engines.protocol import HostArray

__all__ = ["FLOAT32_BITS", "SortedRows", "exact_totals", "prepare_sums", "summed_rows"]

FLOAT32_BITS: Final = 24
"""The bits of a float32."""

_FLOAT64_BITS: Final = 53

_BATCH: Final = 1 << 20
"""The elements that are added at a time, in a few arrays of float64."""


class SortedRows(NamedTuple):
    """Entries of rows in the order of their rows.

    Attributes:
        order: the places of the entries in that order, `(k,) int64`; those of one row as they came.
        rows: each row once, rising, `(n,) int64`.
        starts: the place in `order` of the first entry of each row, `(n,) int64`.
        counts: the number of entries of each row, `(n,) int64`.
    """

    order: HostArray
    rows: HostArray
    starts: HostArray
    counts: HostArray

    @classmethod
    def of(cls, rows: HostArray) -> SortedRows:
        """Sort the rows of some entries, `(k,) int64`."""
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        starts = np.flatnonzero(np.concatenate([np.ones(min(len(rows), 1), bool), ordered[1:] != ordered[:-1]]))
        return cls(order, ordered[starts], starts, np.diff(starts, append=len(rows)))

    def parts(self, places: HostArray, width: int) -> Iterator[tuple[HostArray, HostArray, HostArray, int]]:
        """Cut some rows, by their places, into parts of about a batch, a row of more being alone.

        Yields:
            The places of a part, its entries one row after another, the first of each row among these, and the number
            of columns that make a batch of them.
        """
        elements = np.cumsum(self.counts[places]) * width
        for part in np.split(places, np.flatnonzero(np.diff(elements // _BATCH)) + 1) if len(places) else []:
            own = self.counts[part]
            firsts = np.concatenate([[0], np.cumsum(own)[:-1]])
            entries = self.order[np.repeat(self.starts[part] - firsts, own) + np.arange(own.sum())]
            yield part, entries, firsts, max(_BATCH // len(entries), 1)


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
    found = SortedRows.of(rows)
    sums = values[found.order[found.starts]]
    for part, entries, firsts, columns in found.parts(np.flatnonzero(found.counts > 1), values.shape[1]):
        for low in range(0, values.shape[1], columns):
            wide = values[entries, low : low + columns].astype(np.float64)
            totals, _ = exact_totals(wide, firsts, found.counts[part], FLOAT32_BITS)
            with np.errstate(all="ignore"):
                sums[part, low : low + columns] = totals
    return found.rows, sums


def prepare_sums() -> None:
    """Compile the kernel of sums, so that no step waits for it."""
    host_kernels().exact("lines")


def exact_totals(numbers: HostArray, firsts: HostArray, counts: HostArray, bits: int) -> tuple[HostArray, HostArray]:
    """Return the sums of neighbouring lines of `numbers`, and tell those that are no float64.

    Args:
        numbers: the lines, `(k, columns) float64`.
        firsts: the first line of each sum, `(n,)`.
        counts: the number of lines of each sum, `(n,)`, at least 1.
        bits: the bits of a number at most.

    Returns:
        The sums, `(n, columns) float64`: exact, or rounded to odd, which the second array tells, `(n, columns) bool`.
    """
    if len(firsts) == len(numbers):
        return numbers, np.zeros(numbers.shape, bool)
    spare = 2.0 ** (_FLOAT64_BITS - min(bits, _FLOAT64_BITS))
    with np.errstate(all="ignore"):
        totals = np.add.reduceat(numbers, firsts, axis=0)
        sizes = np.abs(numbers)
        largest = np.maximum.reduceat(sizes, firsts, axis=0)
        sizes[sizes == 0.0] = np.inf
        smallest = np.minimum.reduceat(sizes, firsts, axis=0)
        exact = (counts[:, np.newaxis] * largest <= spare * smallest) | (counts[:, np.newaxis] == 1)
    inexact = ~exact & np.isfinite(largest)
    if inexact.any():
        inexact[inexact] = _add_exactly(numbers, firsts, counts, totals, np.nonzero(inexact))
    return totals, inexact


def _add_exactly(
    numbers: HostArray, firsts: HostArray, counts: HostArray, totals: HostArray, places: tuple[HostArray, ...]
) -> HostArray:
    """Write the sums at some places of `totals`, rounded to odd; tell for each whether that is another number."""
    lines, columns = (np.ascontiguousarray(each) for each in places)
    sums, inexact = np.empty(len(lines)), np.empty(len(lines), bool)
    flat, width = np.ascontiguousarray(numbers).reshape(-1), numbers.shape[1]
    host_kernels().exact("lines")(flat, width, firsts[lines], counts[lines], columns, sums, inexact)
    totals[lines, columns] = sums
    return inexact
