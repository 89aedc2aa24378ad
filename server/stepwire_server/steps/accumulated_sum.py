"""The sum that a micro-step would make of the accumulated gradient and its own, measured. Nothing is changed.

NaN and Inf of an accumulation are in its sum, and nowhere else: a micro-step that is not finite is added like any
other, and an element that is NaN or Inf stays so under all additions. So the last micro-step sees by the sum that the
accumulation is to be dropped, and no pull, load, restart or shard can lose that. Under the policy `reject` the sum
stays finite, because a micro-step that would make it NaN or Inf is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from stepwire.optimizers import Hyperparameters
from stepwire_server.engines.protocol import EngineState, HostArray, Pending
from stepwire_server.rules.exact_norm import exact_sum_of_squares
from stepwire_server.steps.dense_rows import dense_ranges
from stepwire_server.steps.gradient import ChunkRange, StagedGradient
from stepwire_server.steps.update import gradient_factor

__all__ = ["AccumulatedSum"]


class AccumulatedSum:
    """The sum of a step's gradient and those before it.

    Attributes:
        non_finite_count: the elements of the sum that are NaN or Inf.
        first_non_finite: the first flat element of those; the size of the space for none.
    """

    def __init__(self, gradient: StagedGradient, arrays: EngineState, groups: Sequence[Hyperparameters]) -> None:
        """Square the sum, in one pass over both."""
        self._gradient = gradient
        self._arrays = arrays
        self._groups = groups
        self.non_finite_count = 0
        self.first_non_finite = gradient.selection.layout.size
        self._sums: list[list[float]] = [[] for _ in groups]
        asked: list[tuple[int, ChunkRange, Pending[float]]] = []
        for group, found in self._ranges(range(len(groups))):
            pending = arrays.sum_of_squares(*self._arguments(group, found))
            asked.append((group, found, pending))
        for group, found, pending in asked:
            self._measured(group, found, pending.wait())
        for group, found in self._table_ranges(range(len(groups))):  # a chunk is gone with the next one
            self._measured(group, found, arrays.sum_of_squares(*self._arguments(group, found)).wait())

    def squared_norms(self) -> list[float]:
        """Return the sum of squares of each group, within `norms.RELATIVE_ERROR`."""
        return [math.fsum(sums) for sums in self._sums]

    def exact_squared_norm(self, groups: Sequence[int]) -> Fraction:
        """Return the sum of squares of some groups exactly; slow and rarely needed."""
        ranges = itertools.chain(self._ranges(groups), self._table_ranges(groups))
        return exact_sum_of_squares(self._values(group, found) for group, found in ranges)

    def _ranges(self, groups: Sequence[int]) -> Iterator[tuple[int, ChunkRange]]:
        for start, end, group in self._gradient.selection.segments:
            if group in groups:
                yield from ((group, found) for found in self._gradient.ranges(start, end))

    def _table_ranges(self, groups: Sequence[int]) -> Iterator[tuple[int, ChunkRange]]:
        for table in () if self._gradient.rows is None else self._gradient.rows.tables():
            if table.group in groups:
                yield from ((table.group, found) for found in dense_ranges(table, self._arrays))

    def _measured(self, group: int, found: ChunkRange, total: float) -> None:
        self._sums[group].append(total)
        if not math.isfinite(total):
            self._locate_non_finite(group, found)

    def _arguments(self, group: int, found: ChunkRange) -> tuple[Any, ...]:
        factor = gradient_factor(self._groups[group], self._gradient.unscale)
        return found.chunk.gradient, found.begin, found.end, factor, found.start

    def _values(self, group: int, found: ChunkRange) -> HostArray:
        return self._arrays.fetch(*self._arguments(group, found))

    def _locate_non_finite(self, group: int, found: ChunkRange) -> None:
        """Count NaN and Inf and remember the first; rare, so NumPy on the host will do."""
        bad = np.flatnonzero(~np.isfinite(self._values(group, found)))
        # As for a gradient: a client that changes shared memory may have made the element finite since.
        self.non_finite_count += max(int(bad.size), 1)
        self.first_non_finite = min(self.first_non_finite, found.start + (int(bad[0]) if bad.size else 0))
