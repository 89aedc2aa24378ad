"""Reductions that a few bad workers cannot move far. They keep every gradient of a round.

- The **median** of each element; of an even number, the mean of the two in the middle (Yin, Chen, Ramchandran &
  Bartlett 2018).
- The **trimmed mean** of each element: the t smallest and the t largest are left out (the same).
- The **norm-bounded mean**: a gradient whose norm is above a bound is scaled down to the bound (Sun, Kairouz, Suresh &
  McMahan 2019). The bound is a number, or the median of the round's norms.

NaN has no rank and no norm, and Inf no finite mean. So a gradient that is not finite must be refused, or left out,
before it is added. A gradient has a weight of 1 in all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from stepwire.optimizers.norms import rounded_norm
from stepwire_server.aggregation.reduction import Reduction, moved_ranges
from stepwire_server.aggregation.row_sum import ReducedRows
from stepwire_server.engines.cpu.gradient_rows import GradientRows
from stepwire_server.engines.protocol import HostArray
from stepwire_server.rules.exact_norm import exact_sum_of_squares
from stepwire_server.steps.gradient import StagedGradient

__all__ = ["RobustReduction", "median", "norm_bounded_mean", "robust_bytes", "trimmed_mean"]

Combine = Callable[[GradientRows, int], HostArray]
"""A function of rows and their number that returns one gradient, in the memory of the first row."""


class RobustReduction(Reduction):
    """The gradients of a round in rows, and the function that combines them."""

    def __init__(self, rows: GradientRows, combine: Combine) -> None:
        """Keep gradients in `rows`, which are this object's from now on.

        Args:
            rows: one for each worker.
            combine: `median`, or what `trimmed_mean` or `norm_bounded_mean` returns.
        """
        self._rows = rows
        self._combine = combine
        self._count = 0
        self._combined = False

    @property
    def nbytes(self) -> int:
        """See `Reduction.nbytes`."""
        return self._rows.nbytes

    def add(self, gradient: StagedGradient, factor: float) -> None:
        """See `Reduction.add`; the product with the factor, used as float32, is rounded to float32."""
        assert not self._combined
        row, done = self._count, 0
        for chunk, start, begin, end in moved_ranges(gradient):
            self._rows.zero(row, done, start)
            self._rows.write(row, start, chunk.gradient, begin, end, factor)
            done = start + end - begin
        self._rows.zero(row, done, gradient.selection.layout.size)
        self._count += 1

    def reduced(self, divisor: float) -> HostArray:
        """See `Reduction.reduced`; the divisor is the number of gradients, whatever the argument.

        Raises:
            ValueError: no gradient was added.
        """
        assert not self._combined
        if not self._count:
            raise ValueError("no gradient was added to the round")
        self._combined = True
        return self._combine(self._rows, self._count)

    def reduced_rows(self, divisor: float) -> Sequence[ReducedRows]:
        """See `Reduction.reduced_rows`: a session with tables has none of these reductions."""
        return ()

    def clear(self) -> None:
        """See `Reduction.clear`."""
        self._count = 0
        self._combined = False

    def close(self) -> None:
        """See `Reduction.close`."""
        self.clear()
        self._rows.close()


def median(rows: GradientRows, count: int) -> HostArray:
    """Return the median of each element."""
    return rows.ranked_mean(count, (count - 1) // 2, count // 2 + 1)


def trimmed_mean(trim: int) -> Combine:
    """Leave out the smallest and the largest values of each element; where none would be left, all but the median.

    Args:
        trim: the number of values left out at each end.
    """

    def combine(rows: GradientRows, count: int) -> HostArray:
        left_out = min(trim, (count - 1) // 2)
        return rows.ranked_mean(count, left_out, count - left_out)

    return combine


def norm_bounded_mean(bound: float | None) -> Combine:
    """Scale gradients down to a bound of their norm, to float32 rounding.

    Args:
        bound: the bound of the L2 norm; None for the median of the round's norms.
    """

    def combine(rows: GradientRows, count: int) -> HostArray:
        norms = [_norm(rows, row) for row in range(count)]
        limit = statistics.median(norms) if bound is None else bound
        return rows.scaled_mean([1.0 if norm <= limit else float(np.float32(limit / norm)) for norm in norms])

    return combine


def robust_bytes(size: int, workers: int) -> int:
    """Return the bytes to reserve for a robust reduction of the gradients of so many workers."""
    return 4 * size * workers


def _norm(rows: GradientRows, row: int) -> float:
    """Return the L2 norm of a row, correctly rounded to 24 bits."""
    return rounded_norm(rows.sum_of_squares(row), lambda: exact_sum_of_squares([rows.values(row)]))
