"""The sum, the mean and the weighted mean of gradients, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Sequence

from stepwire.errors import ResourceExhaustedError
from stepwire.layout import Layout
from stepwire_server.aggregation.reduction import Reduction, moved_ranges
from stepwire_server.aggregation.row_sum import ReducedRows, RowSum
from stepwire_server.engines.cpu.exact_sum import ExactSum
from stepwire_server.engines.protocol import HostArray
from stepwire_server.steps.gradient import StagedGradient

__all__ = ["Accumulator", "accumulator_bytes"]


class Accumulator(Reduction):
    """The exact sum of gradients times factors, divided once and rounded once.

    NaN and Inf of a gradient are in the result. The memory grows where sums are inexact, which `nbytes` tells: rarely,
    unless factors have many bits or numbers of very different size meet.
    """

    def __init__(self, total: ExactSum, layout: Layout) -> None:
        """Accumulate in `total`, which is this object's from now on, of `layout.dense_size` elements."""
        self._total = total
        self._layout = layout
        self._rows = RowSum(layout)

    @property
    def nbytes(self) -> int:
        """See `Reduction.nbytes`."""
        return self._total.nbytes + self._rows.nbytes

    def add(self, gradient: StagedGradient, factor: float) -> None:
        """See `Reduction.add`."""
        try:
            for chunk, start, begin, end in moved_ranges(gradient):
                self._total.add(self._layout.dense_place(start), chunk.gradient, begin, end, factor)
        except MemoryError as problem:
            raise ResourceExhaustedError(
                "no memory for the rounding errors of a sum of gradients; close a session or use a machine with more",
                metadata={"held_bytes": self.nbytes},
            ) from problem
        if gradient.rows is not None:
            self._rows.add(gradient.rows, factor)

    def reduced(self, divisor: float) -> HostArray:
        """See `Reduction.reduced`."""
        return self._total.mean(divisor)

    def reduced_rows(self, divisor: float) -> Sequence[ReducedRows]:
        """See `Reduction.reduced_rows`."""
        return self._rows.reduced(divisor)

    def clear(self) -> None:
        """See `Reduction.clear`."""
        self._total.clear()
        self._rows.clear()

    def close(self) -> None:
        """See `Reduction.close`."""
        self._total.close()
        self._rows.clear()


def accumulator_bytes(size: int, *, whole_factors: bool = True) -> int:
    """Return the bytes to reserve for an accumulator, whatever the number of workers.

    Args:
        size: elements of the flat space outside tables.
        whole_factors: factors are powers of two or small integers. Sums are then inexact in few blocks, for whose
            errors there is half a byte an element. Other factors make errors, and errors of errors, of most sums.
    """
    return 8 * size + (size // 2 if whole_factors else 16 * size)
