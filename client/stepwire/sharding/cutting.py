"""Where a model is cut, so that its parts are about equally large and each computes what the whole would.

The flat space is cut into one contiguous range a shard. Small tensors and those of layerwise rules stay whole; a large
tensor is cut at multiples of `GRAIN` of its own elements, and never so that a small piece is left. So 8-bit moments
have the blocks that they have in the whole, and no piece is held in another precision than its tensor would be.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import Final, NamedTuple

from stepwire.layout import SMALLEST_IN_BLOCKS, Layout

__all__ = ["GRAIN", "Slice", "cut"]

GRAIN: Final = 65_536
"""Tensors are cut at multiples of this, in elements."""


class Slice(NamedTuple):
    """Elements `[begin, end)` of the tensor with index `tensor` in the layout of the whole."""

    tensor: int
    begin: int
    end: int


def cut(layout: Layout, most: int, *, within_tensors: bool) -> list[list[Slice]]:
    """Cut a model into shards of about equal size, in the order of its flat space.

    Args:
        layout: of the whole.
        most: shards at most; there are fewer where there is less to cut than that, and at least one.
        within_tensors: large tensors may be cut; False for layerwise rules, whose norms are those of whole tensors.

    Returns:
        The slices of each shard in flat order. Each shard has elements, unless the whole has none.
    """
    shards: list[list[Slice]] = [[]]
    bounds = _bounds(layout, most, within_tensors)
    start, rank = 0, 0
    for index, tensor in enumerate(layout.tensors):
        end = start + tensor.count
        begin = start
        while rank < len(bounds) and bounds[rank] < max(end, start + 1):
            if bounds[rank] > begin:
                shards[-1].append(Slice(index, begin - start, bounds[rank] - start))
            begin = bounds[rank]
            shards.append([])
            rank += 1
        shards[-1].append(Slice(index, begin - start, tensor.count))
        start = end
    return shards


def _bounds(layout: Layout, most: int, within_tensors: bool) -> list[int]:
    """Return where shards end and the next begin, rising, counted in elements without padding."""
    places = _places(layout, within_tensors)
    total = sum(tensor.count for tensor in layout.tensors)
    chosen = (_nearest(places, shard * total / most) for shard in range(1, most))
    return [place for place, _ in itertools.groupby(chosen) if 0 < place < total]


def _places(layout: Layout, within_tensors: bool) -> list[int]:
    """Return where the space may be cut, rising, its ends included."""
    places, start = [0], 0
    for tensor in layout.tensors:
        if within_tensors:
            places += range(start + GRAIN, start + tensor.count - SMALLEST_IN_BLOCKS + 1, GRAIN)
        start += tensor.count
        places.append(start)
    return places


def _nearest(places: list[int], ideal: float) -> int:
    rank = bisect_left(places, ideal)
    return min(places[max(rank - 1, 0) : rank + 1], key=lambda place: abs(place - ideal))
