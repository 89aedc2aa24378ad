"""The sum of several workers' rows, and its quotient: of each row that came to any of them, exact and rounded once.

Rows are kept as they came, and added up when the round is over. So the memory grows with the rows that came, and never
with the table. A row that a worker did not send counts as zeros from it, as a dense gradient has them.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from stepwire.layout import Layout
from stepwire_server.engines.cpu.exact_sum import EXACT_DIVISOR_BITS, rounded_quotient, significant_bits
from stepwire_server.engines.cpu.numpy_exact import EXACT_KERNELS
from stepwire_server.engines.cpu.numpy_lines import few_with_the_sum_of
from stepwire_server.engines.protocol import HostArray
from stepwire_server.steps.row_gradients import RowEntries, RowGradients, row_bytes
from stepwire_server.steps.summed_rows import FLOAT32_BITS, SortedRows, exact_totals

__all__ = ["ReducedRows", "RowSum"]


class ReducedRows(NamedTuple):
    """The reduced gradient of one table.

    Attributes:
        tensor: the index of the table.
        offset: its first flat element.
        rows: each row that came, rising, `(n,) int64`.
        values: their gradients, `(n, width) float32`.
    """

    tensor: int
    offset: int
    rows: HostArray
    values: HostArray


class RowSum:
    """The rows of one round. Not thread-safe: the session serialises the calls."""

    def __init__(self, layout: Layout) -> None:
        """Have no rows of the tables of a layout."""
        self._layout = layout
        self._tables: dict[int, list[tuple[RowEntries, float]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the rows take until their reply: as kept, and for the sum."""
        return sum(
            row_bytes(len(entries.rows), entries.values.shape[1], 4)
            for table in self._tables.values()
            for entries, _ in table
        )

    def add(self, gradient: RowGradients, factor: float) -> None:
        """Add one worker's rows, times a factor."""
        for entries in gradient.entries():
            self._tables.setdefault(entries.tensor, []).append((entries, factor))

    def reduced(self, divisor: float) -> list[ReducedRows]:
        """Return the quotients of the sums, of each table that a worker named, by rising index."""
        return [self._reduced(index, self._tables[index], divisor) for index in sorted(self._tables)]

    def clear(self) -> None:
        """Have no rows."""
        self._tables = {}

    def _reduced(self, index: int, parts: list[tuple[RowEntries, float]], divisor: float) -> ReducedRows:
        counts = [len(entries.rows) for entries, _ in parts]
        rows = np.concatenate([entries.rows for entries, _ in parts])
        values = np.concatenate([entries.values for entries, _ in parts])
        factors = None if all(own == 1.0 for _, own in parts) else np.repeat([own for _, own in parts], counts)
        bits = FLOAT32_BITS + (
            0 if factors is None else max((significant_bits(own) for _, own in parts if own), default=0)
        )
        table = self._layout.tensors[index]
        return ReducedRows(index, table.offset, *_quotients(rows, values, factors, bits, divisor))


def _quotients(
    rows: HostArray, values: HostArray, factors: HostArray | None, bits: int, divisor: float
) -> tuple[HostArray, HostArray]:
    """Return each row once, rising, with its sum of products over the divisor."""
    found = SortedRows.of(rows)
    width, exact = values.shape[1], significant_bits(divisor) <= EXACT_DIVISOR_BITS
    out = np.empty((len(found.rows), width), np.float32)
    once = found.counts == 1
    parts = itertools.chain(*(found.parts(np.flatnonzero(kind), width) for kind in (once, ~once)))
    for part, entries, firsts, columns in parts:
        for low in range(0, width, columns):
            numbers = values[entries, low : low + columns].astype(np.float64)
            if factors is not None:
                with np.errstate(all="ignore"):
                    numbers *= factors[entries, np.newaxis]
            totals, inexact = exact_totals(numbers, firsts, found.counts[part], bits)
            out[part, low : low + columns] = _divided(totals, divisor)
            for row, column in () if exact or not inexact.any() else _doubtful(totals, inexact, divisor):
                own = few_with_the_sum_of(numbers[firsts[row] : firsts[row] + found.counts[part[row]], column])
                out[part[row], low + column] = rounded_quotient(sum(map(Fraction, own), Fraction(0)), divisor)
    return found.rows, out


def _divided(totals: HostArray, divisor: float) -> HostArray:
    flat, out = np.ascontiguousarray(totals).reshape(-1), np.empty(totals.size, np.float32)
    inverse = 1.0 / divisor if significant_bits(divisor) == 1 else 0.0
    EXACT_KERNELS["mean"](flat, out, 0, len(flat), divisor, inverse)
    return out.reshape(totals.shape)


def _doubtful(totals: HostArray, inexact: HostArray, divisor: float) -> list[list[int]]:
    """Return the places whose sum, which is no float64, may have another quotient than the number beside it."""
    with np.errstate(all="ignore"):
        below, above = (_divided(np.nextafter(totals, bound), divisor) for bound in (-np.inf, np.inf))
    found: list[list[int]] = np.argwhere(inexact & (below.view(np.uint32) != above.view(np.uint32))).tolist()
    return found
