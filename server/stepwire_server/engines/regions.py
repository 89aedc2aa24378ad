"""Regions of the flat space in which a slot is held alike, and the arrays that hold them.

A slot whose regions are held in several precisions has an array a precision. There its regions lie one after another,
and so take no memory in another's array.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stepwire.layout import GROUP_ALIGNMENT
from stepwire_server.rules import Precision

__all__ = ["Holding", "PackedRanges", "Range", "Region", "Table", "packed"]

Range = tuple[int, int]
"""Flat elements `[start, end)`."""


class Region(NamedTuple):
    """Flat elements `[start, end)` that a slot holds in one precision; those in 8 bits start at a block."""

    start: int
    end: int
    precision: Precision


class Table(NamedTuple):
    """The place of a table: `rows` rows of `width` elements each, one after another, from flat element `start` on."""

    start: int
    rows: int
    width: int

    @property
    def elements(self) -> int:
        """The elements of the table."""
        return self.rows * self.width


Holding = Precision | tuple[Region, ...]
"""How a slot is held: all in one precision, or by regions in order. What lies between regions is read as zeros."""


class PackedRanges:
    """Some ranges, and where each lies in their array.

    Attributes:
        ranges: the ranges, in order.
        count: the number of elements of the array.
    """

    def __init__(self, ranges: Sequence[Range], alignment: int) -> None:
        """Lay ranges out, so that multiples of `alignment` elements in the flat space are multiples in the array."""
        self.ranges = tuple(ranges)
        self.count = 0
        self._offsets: list[int] = []
        for start, end in ranges:
            offset = self.count + (start - self.count) % alignment
            self._offsets.append(offset)
            self.count = offset + end - start

    def at(self, start: int, size: int = 1) -> int | None:
        """Return the index of a flat element in the array, or None unless it and those after it lie in one range."""
        index = bisect_right(self.ranges, start, key=lambda each: each[0]) - 1
        if index < 0 or start + max(size, 1) > self.ranges[index][1]:
            return None
        return self._offsets[index] + start - self.ranges[index][0]

    def within(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield the parts of `[start, end)` that lie in the array: start, end and the index of the first there."""
        first = bisect_right(self.ranges, start, key=lambda each: each[1])
        for (low, high), offset in zip(self.ranges[first:], self._offsets[first:], strict=True):
            if low >= end:
                return
            yield max(low, start), min(high, end), offset + max(start - low, 0)


# Of float32 a line of the cache. A GPU moves four elements at a time where all arrays of a range are aligned alike.
_ALIGNMENT = 16


def packed(regions: Sequence[Region]) -> dict[Precision, PackedRanges]:
    """Return the ranges of each precision that some regions have; those in 8 bits start at a block there too."""
    ranges: dict[Precision, list[Range]] = {}
    for start, end, precision in regions:
        ranges.setdefault(precision, []).append((start, end))
    return {
        precision: PackedRanges(found, GROUP_ALIGNMENT if precision is Precision.INT8 else _ALIGNMENT)
        for precision, found in ranges.items()
    }
