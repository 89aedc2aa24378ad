"""Rows of tables that are cut over shards: each shard has the gradients, and the places, of its range of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stepwire.arrays.rows import RowGradient, RowTarget
from stepwire.layout import Layout
from stepwire.sharding.partition import ShardRanges

__all__ = ["ReadRows", "own_gradients", "own_targets", "read_rows"]


class ReadRows(NamedTuple):
    """The rows that one shard is asked for.

    Attributes:
        own: their place in an array of the shard's, by the shard's own numbers.
        target: the place of all rows that are asked for.
        here: those of them that the shard has, `(n,) bool`.
    """

    own: RowTarget
    target: RowTarget
    here: npt.NDArray[np.bool_]

    def copy(self) -> None:
        """Copy the rows to the place of all."""
        self.target.values[self.here] = self.own.values


def own_gradients(ranges: ShardRanges, layout: Layout, rows: Sequence[RowGradient]) -> tuple[RowGradient, ...]:
    """Return the rows of a gradient of the whole that a shard has; a table of the step may have none here.

    Args:
        ranges: the ranges of the shard.
        layout: the layout of the shard's session.
        rows: the gradients of tables of the whole.
    """
    found = []
    for gradient in rows:
        for own, low, high in _ranges_of(ranges, gradient.tensor, gradient.values.shape[1]):
            here = _within(gradient.indices, low, high)
            indices = gradient.indices[here] - np.uint64(low)
            found.append(RowGradient(own, layout.tensors[own].offset, indices, gradient.values[here]))
    return tuple(sorted(found, key=lambda each: each.tensor))


def own_targets(ranges: ShardRanges, targets: Sequence[RowTarget]) -> tuple[RowTarget, ...]:
    """Return the places of the rows of a reply that a shard sends: the rows of each target rise."""
    found = []
    for target in targets:
        for own, low, high in _ranges_of(ranges, target.tensor, target.values.shape[1]):
            first, last = np.searchsorted(target.indices, np.array([low, high], np.uint64)).tolist()
            indices = target.indices[first:last] - np.uint64(low)
            found.append(RowTarget(own, indices, target.values[first:last]))
    return tuple(found)


def read_rows(
    ranges: ShardRanges, layout: Layout, targets: Sequence[RowTarget], dtype: np.dtype[Any]
) -> list[ReadRows]:
    """Return what a shard is asked for in a pull of rows; one without any of them is asked for no rows of a table.

    Args:
        ranges: the ranges of the shard.
        layout: the layout of the shard's session.
        targets: the rows of the whole, in any order.
        dtype: the dtype of the rows.
    """
    found = []
    for target in targets:
        width = target.values.shape[1]
        for own, low, high in _ranges_of(ranges, target.tensor, width):
            here = _within(target.indices, low, high)
            indices = target.indices[here] - np.uint64(low)
            found.append(ReadRows(RowTarget(own, indices, np.empty((len(indices), width), dtype)), target, here))
    if not found and layout.tables:
        own, table = next(iter(layout.tables.items()))
        nothing = RowTarget(own, np.empty(0, np.uint64), np.empty((0, table.spec.width), dtype))
        found.append(ReadRows(nothing, nothing, np.empty(0, np.bool_)))
    return found


def _ranges_of(ranges: ShardRanges, tensor: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Yield the shard's index of its range of a table, with the first row of it, and one past the last."""
    for own in ranges.indices([tensor]):
        each = ranges.ranges[own]
        yield own, each.begin // width, each.end // width


def _within(indices: npt.NDArray[np.uint64], low: int, high: int) -> npt.NDArray[np.bool_]:
    here: npt.NDArray[np.bool_] = (indices >= np.uint64(low)) & (indices < np.uint64(high))
    return here
