"""Rows of tables that are cut over shards: each shard has the gradients, and the places, of its rows.

A shard has a range of rows. An id that names a row stands for one number in the range of the table's capacity, which a
hash chooses. The shard whose range has that number has the id, so ids are spread as evenly as capacity. The number is

    z ← id · 0x9E3779B97F4A7C15             modulo 2⁶⁴
    z ← (z ⊕ (z >> 32)) · 0xD6E8FEB86659FD93
    number ← ((z >> 32) · capacity) >> 32

with the finisher of a multiplicative hash (Knuth, Dietzfelbinger et al. 1997). It belongs to the contract of several
servers: other clients of a session must find the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from stepwire.arrays.rows import IdTarget, PulledRows, RowGradient, RowTarget
from stepwire.layout import Layout
from stepwire.sharding.partition import ShardRanges
from stepwire.sharding.range_names import origin_of

__all__ = ["MOST_CAPACITY", "numbers_of_ids", "own_gradients", "own_targets", "read_rows"]

MOST_CAPACITY: Final = (1 << 32) - 1
"""The largest capacity of a table with ids that is cut."""

_FIRST: Final = np.uint64(0x9E3779B97F4A7C15)
_SECOND: Final = np.uint64(0xD6E8FEB86659FD93)
_HALF: Final = np.uint64(32)

Indices = npt.NDArray[np.uint64]


def numbers_of_ids(ids: Indices, capacity: int) -> Indices:
    """Return the numbers in `[0, capacity)` that ids stand for, `(n,) uint64`; see the module."""
    with np.errstate(over="ignore"):
        mixed = ids * _FIRST
        mixed = (mixed ^ (mixed >> _HALF)) * _SECOND
    numbers: Indices = ((mixed >> _HALF) * np.uint64(capacity)) >> _HALF
    return numbers


class _OwnRange(NamedTuple):
    """The rows of one table that a shard has.

    Attributes:
        tensor: the shard's index of the table.
        low: the first row.
        high: one past the last.
        capacity: the capacity of the whole table with ids; 0 for rows by indices.
    """

    tensor: int
    low: int
    high: int
    capacity: int

    def has(self, rows: Indices) -> npt.NDArray[np.bool_]:
        """Tell which rows the shard has, `(n,) bool`."""
        numbers = numbers_of_ids(rows, self.capacity) if self.capacity else rows
        here: npt.NDArray[np.bool_] = (numbers >= np.uint64(self.low)) & (numbers < np.uint64(self.high))
        return here

    def named(self, rows: Indices) -> Indices:
        """Return rows that the shard has as it names them: ids as they are."""
        return rows if self.capacity else rows - np.uint64(self.low)


def own_gradients(ranges: ShardRanges, layout: Layout, rows: Sequence[RowGradient]) -> tuple[RowGradient, ...]:
    """Return the rows of a gradient of the whole that a shard has; a table of the step may have none here.

    Args:
        ranges: the ranges of the shard.
        layout: the layout of the shard's session.
        rows: the gradients of tables of the whole.
    """
    found = []
    for gradient in rows:
        for own in _ranges_of(ranges, layout, gradient.tensor):
            here, offset = own.has(gradient.indices), layout.tensors[own.tensor].offset
            found.append(RowGradient(own.tensor, offset, own.named(gradient.indices[here]), gradient.values[here]))
    return tuple(sorted(found, key=lambda each: each.tensor))


def own_targets(ranges: ShardRanges, layout: Layout, targets: Sequence[RowTarget]) -> tuple[RowTarget, ...]:
    """Return the places of the rows of a reply that a shard sends: the rows of each target rise."""
    found = []
    for target in targets:
        for own in _ranges_of(ranges, layout, target.tensor):
            if own.capacity:
                found.append(_scattered(own, target))
                continue
            first, last = np.searchsorted(target.indices, np.array([own.low, own.high], np.uint64)).tolist()
            found.append(RowTarget(own.tensor, own.named(target.indices[first:last]), target.values[first:last]))
    return tuple(found)


def read_rows(
    ranges: ShardRanges, layout: Layout, targets: PulledRows, dtype: np.dtype[Any]
) -> list[RowTarget | IdTarget]:
    """Return the rows, or ids, that a shard is asked for in a pull; one without any is asked for no rows of a table.

    Args:
        ranges: the ranges of the shard.
        layout: the layout of the shard's session.
        targets: the rows of the whole, in any order, or the places of ids.
        dtype: the dtype of the rows.
    """
    found = [
        _scattered(own, target) if isinstance(target, RowTarget) else IdTarget(own.tensor, target.found, own.low)
        for target in targets
        for own in _ranges_of(ranges, layout, target.tensor)
    ]
    if not found and layout.tables:
        own, table = next(iter(layout.tables.items()))
        found.append(RowTarget(own, np.empty(0, np.uint64), np.empty((0, table.spec.width), dtype)))
    return found


def _scattered(own: _OwnRange, target: RowTarget) -> RowTarget:
    places = np.flatnonzero(own.has(target.indices))
    return RowTarget(own.tensor, own.named(target.indices[places]), target.values, places)


def _ranges_of(ranges: ShardRanges, layout: Layout, tensor: int) -> Iterator[_OwnRange]:
    """Yield the shard's range of a table."""
    for own in ranges.indices([tensor]):
        each, spec = ranges.ranges[own], layout.tensors[own].spec
        capacity = origin_of(spec).shape[0] if spec.hashed else 0
        yield _OwnRange(own, each.begin // spec.width, each.end // spec.width, capacity)
