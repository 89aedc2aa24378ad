"""The elements of a model on their way from the shards of one partition to those of another one.

Each shard has its ranges in a flat space of its own. A block of an array there falls into ranges of the arrays of new
shards. Ranges that follow one another on both sides are one. Padding belongs to no tensor, and is left out.

The numbers of a table's rows are arrays too: "row_numbers.I", where I is the table's index in its shard. Counts are two
numbers a row, the lower halves of all rows before the upper ones; sums are one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy.typing as npt

from stepwire.layout import Layout, TensorSpec
from stepwire.sharding.partition import Partition, TensorRange

__all__ = ["MovedBlock", "Redistribution"]

_ROW_NUMBERS: Final = "row_numbers."
_ONE_SUM_A_ROW: Final = "row_wise"


class MovedBlock(NamedTuple):
    """A block of an array of a new shard.

    Attributes:
        shard: the rank of the shard.
        slot: the name of the array.
        start: the first element.
        values: the elements, `(n,)`.
    """

    shard: int
    slot: str
    start: int
    values: npt.NDArray[Any]


class _Way(NamedTuple):
    """The way of elements `[start, end)` of an array: to those of a new shard's array `slot`, from `target` on."""

    start: int
    end: int
    shard: int
    slot: str
    target: int


class Redistribution:
    """The ways from the shards of one partition to those of another one of the same model. Immutable."""

    def __init__(self, former: Partition, layouts: Sequence[Layout], new: Partition, spaces: Sequence[Layout]) -> None:
        """Find the ways.

        Args:
            former: the partition that the model has.
            layouts: the flat spaces of its shards.
            new: the partition that the model gets.
            spaces: the flat spaces of its shards.
        """
        self._former, self._layouts = former, layouts
        self._new, self._spaces = new, spaces
        self._dense = [self._ways(shard) for shard in range(len(layouts))]
        self._rows = {
            (shard, table): self._ways_of_rows(shard, table)
            for shard, layout in enumerate(layouts)
            for table in layout.tables
        }

    def split(self, shard: int, slot: str, start: int, values: npt.NDArray[Any]) -> Iterator[MovedBlock]:
        """Yield the blocks of new shards that a block of a shard's array falls into.

        Args:
            shard: the rank of the shard.
            slot: the name of the array.
            start: the first element of the block.
            values: the elements, `(n,)`.
        """
        if slot.startswith(_ROW_NUMBERS):
            ways = self._rows[shard, int(slot.removeprefix(_ROW_NUMBERS))]
        else:
            ways = self._dense[shard]
        end = start + len(values)
        for way in ways[bisect_right(ways, start, key=lambda way: way.end) :]:
            if way.start >= end:
                return
            low, high = max(way.start, start), min(way.end, end)
            at = way.target + low - way.start
            yield MovedBlock(way.shard, way.slot or slot, at, values[low - start : high - start])

    def _ways(self, shard: int) -> list[_Way]:
        """Return the ways of a shard's elements, by their start; their slot is the block's own."""
        found: list[_Way] = []
        layout = self._layouts[shard]
        for own, source in enumerate(self._former.shards[shard].ranges):
            offset = layout.tensors[own].offset - source.begin
            for rank, index, low, high in self._meeting(source):
                place = self._spaces[rank].tensors[index].offset - self._new.shards[rank].ranges[index].begin
                found.append(_Way(offset + low, offset + high, rank, "", place + low))
        return _joined(sorted(found))

    def _ways_of_rows(self, shard: int, table: int) -> list[_Way]:
        """Return the ways of the numbers of a table's rows."""
        source, spec = self._former.shards[shard].ranges[table], self._layouts[shard].tensors[table].spec
        found = []
        for rank, index, low, high in self._meeting(source):
            begin, there = self._new.shards[rank].ranges[index].begin, self._spaces[rank].tensors[index].spec
            rows = range(low // spec.width, high // spec.width)
            for half in range(_numbers_a_row(spec)):
                start = half * spec.shape[0] + rows.start - source.begin // spec.width
                target = half * there.shape[0] + rows.start - begin // spec.width
                found.append(_Way(start, start + len(rows), rank, f"{_ROW_NUMBERS}{index}", target))
        return sorted(found)

    def _meeting(self, source: TensorRange) -> Iterator[tuple[int, int, int, int]]:
        """Yield where a range of a tensor meets those of new shards: rank, index there, first element, one past it."""
        for rank, ranges in enumerate(self._new.shards):
            for index in ranges.indices([source.tensor]):
                other = ranges.ranges[index]
                low, high = max(source.begin, other.begin), min(source.end, other.end)
                if low < high:
                    yield rank, index, low, high


def _numbers_a_row(spec: TensorSpec) -> int:
    return 1 if spec.table == _ONE_SUM_A_ROW else 2


def _joined(ways: Sequence[_Way]) -> list[_Way]:
    """Join ways that follow one another on both sides."""
    joined: list[_Way] = []
    for way in ways:
        last = joined[-1] if joined else None
        if last is not None and (last.end, last.shard, last.target + last.end - last.start) == (
            way.start,
            way.shard,
            way.target,
        ):
            joined[-1] = last._replace(end=way.end)
        else:
            joined.append(way)
    return joined
