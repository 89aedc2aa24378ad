"""The reduction of several workers' gradients to one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from stepwire_server.aggregation.row_sum import ReducedRows
from stepwire_server.engines.protocol import HostArray
from stepwire_server.steps.gradient import ChunkRange, StagedGradient

__all__ = ["Reduction", "moved_ranges"]


class Reduction(Protocol):
    """The gradients of one round, as far as they were added. Not thread-safe: the session serialises the calls.

    The result does not depend on the order of gradients, chunks and threads. It is the same with each engine, because
    it is computed in the host's memory. Gradients are staged by `CpuEngine.staging`.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        ...

    def add(self, gradient: StagedGradient, factor: float) -> None:
        """Add one worker's gradient, all segments of its selection; it may be closed afterwards.

        Args:
            gradient: a complete gradient. An element outside of its selection counts as 0.
            factor: the factor of its elements: its weight times `StagedGradient.unscale`.

        Raises:
            ResourceExhaustedError: there is no memory for it; the round holds a part of the gradient, until `clear`.
        """
        ...

    def reduced(self, divisor: float) -> HostArray:
        """Reduce the gradients that were added to one, each element rounded once.

        Nothing is added to a round that was reduced.

        Args:
            divisor: the divisor of a sum: the number of gradients, the sum of their weights, or 1. Reductions that are
                no quotient of a sum pay no heed to it.

        Returns:
            `(dense_size,) float32`, the elements outside tables one behind another, valid until `clear`.
        """
        ...

    def reduced_rows(self, divisor: float) -> Sequence[ReducedRows]:
        """Reduce the rows of tables that were added, as `reduced` does the rest."""
        ...

    def clear(self) -> None:
        """Begin the next round."""
        ...

    def close(self) -> None:
        """Give the memory back. Closing twice is harmless."""
        ...


def moved_ranges(gradient: StagedGradient) -> Iterator[ChunkRange]:
    """Yield the ranges of chunks that cover the segments of a gradient's selection, in order."""
    for start, end, _ in gradient.selection.segments:
        yield from gradient.ranges(start, end)
