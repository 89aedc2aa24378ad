"""The elements of a model that each shard holds: chosen when sessions are created, and read again from them alone.

The flat space is partitioned into one contiguous range a shard. Small tensors, and those of layerwise rules, stay
whole. A large tensor is cut at multiples of `GRAIN` of its own elements, and never so that a small remainder is left.
So 8-bit moments have the blocks that they have in the whole, and every range is held in the precision of its tensor.
Tables are cut between rows, at multiples of the least number of rows that have as many elements.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from stepwire.arrays.packing import Flat
from stepwire.errors import InvalidRequestError
from stepwire.layout import SMALLEST_IN_BLOCKS, Layout, TensorSpec, place
from stepwire.sharding.range_names import Origin, origin_of, range_spec, whole_spec

__all__ = ["GRAIN", "Partition", "ShardRanges", "TensorRange", "cut"]


GRAIN: Final = 65_536
"""Tensors are cut at multiples of this, in elements."""


class TensorRange(NamedTuple):
    """Elements `[begin, end)` of the tensor with index `tensor` in the layout of the whole."""

    tensor: int
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class ShardRanges:
    """The ranges that one shard holds.

    Attributes:
        ranges: the ranges, in the order of the layout of the shard's session.
    """

    ranges: tuple[TensorRange, ...]

    def of(self, flat: Flat) -> Flat:
        """Return views of the shard's ranges of 1-D arrays in layout order; empty views of an empty array."""
        return [flat[each.tensor][each.begin : each.end] for each in self.ranges]

    def indices(self, tensors: Iterable[int]) -> list[int]:
        """Return the shard's indices of its ranges of some tensors of the whole, in the order of those tensors."""
        return [self._ranks[tensor] for tensor in tensors if tensor in self._ranks]

    @functools.cached_property
    def _ranks(self) -> dict[int, int]:
        return {each.tensor: index for index, each in enumerate(self.ranges)}


@dataclasses.dataclass(frozen=True)
class Partition:
    """A model partitioned over shards.

    Attributes:
        layout: the layout of the whole, as one session would have it.
        shards: the ranges of each shard, in flat order.
    """

    layout: Layout
    shards: tuple[ShardRanges, ...]

    @classmethod
    def make(cls, layout: Layout, most: int, *, within_tensors: bool) -> Partition:
        """Partition a model; see `cut`."""
        shards = cut(layout, most, within_tensors=within_tensors)
        return cls(layout, tuple(ShardRanges(tuple(ranges)) for ranges in shards))

    @classmethod
    def read(cls, layouts: Sequence[Layout]) -> Partition:
        """Return the whole again from the layouts of the shards' sessions, in order.

        Raises:
            InvalidRequestError: the sessions are not the shards of one model in order.
        """
        found: dict[str, list[tuple[Origin, TensorSpec]]] = {}
        for origin, spec in _in_flat_order(layouts):
            found.setdefault(origin.name, []).append((origin, spec))
        specs = [_whole(ranges) for ranges in found.values()]
        ranks = {spec.name: index for index, spec in enumerate(specs)}
        shards = [
            ShardRanges(
                tuple(TensorRange(ranks[each.name], each.begin, each.end) for each in map(origin_of, _specs(layout)))
            )
            for layout in layouts
        ]
        return cls(place(specs, len(layouts[0].groups)), tuple(shards))

    def specs(self, shard: int) -> list[TensorSpec]:
        """Return the tensors of a shard's session.

        Raises:
            InvalidRequestError: a name becomes too long.
        """
        tensors = self.layout.tensors
        return [range_spec(tensors[each.tensor].spec, each.begin, each.end) for each in self.shards[shard].ranges]


def _specs(layout: Layout) -> list[TensorSpec]:
    return [tensor.spec for tensor in layout.tensors]


def _in_flat_order(layouts: Sequence[Layout]) -> Iterator[tuple[Origin, TensorSpec]]:
    """Yield every range with its origin, in the flat order of the whole: group by group."""
    if any(len(layout.groups) != len(layouts[0].groups) for layout in layouts):
        raise _foreign("they have different numbers of parameter groups")
    for group in range(len(layouts[0].groups)):
        for layout in layouts:
            yield from ((origin_of(spec), spec) for spec in _specs(layout) if spec.group == group)


def _whole(ranges: Sequence[tuple[Origin, TensorSpec]]) -> TensorSpec:
    """Return the tensor that consists of ranges, in order."""
    first, spec = ranges[0][0], whole_spec(*ranges[0])
    reached = 0
    for origin, other in ranges:
        alike = whole_spec(origin, other) == dataclasses.replace(spec, shape=origin.shape)
        if not alike or origin.shape != first.shape or origin.begin != reached:
            raise _foreign(f"tensor {first.name!r} is in ranges that do not follow each other")
        reached = origin.end
    if reached != math.prod(first.shape):
        raise _foreign(f"of tensor {first.name!r} there are {reached} of {math.prod(first.shape)} elements")
    return spec


def _foreign(problem: str) -> InvalidRequestError:
    return InvalidRequestError.of(
        "session_id",
        f"these sessions are not the shards of one model: {problem}; give all its ids, in the order in which "
        "`Session.session_id` has them",
    )


def cut(layout: Layout, most: int, *, within_tensors: bool) -> list[list[TensorRange]]:
    """Cut a model into shards of about equal size, in the order of its flat space.

    Args:
        layout: the layout of the whole.
        most: the most shards; a small model has fewer, and every model at least one.
        within_tensors: large tensors may be cut; False for layerwise rules, whose norms are those of whole tensors.

    Returns:
        The ranges of each shard in flat order. Each shard has elements, unless the whole has none.
    """
    shards: list[list[TensorRange]] = [[]]
    bounds = _bounds(layout, most, within_tensors)
    start, rank = 0, 0
    for index, tensor in enumerate(layout.tensors):
        end = start + tensor.count
        begin = start
        while rank < len(bounds) and bounds[rank] < max(end, start + 1):
            if bounds[rank] > begin:
                shards[-1].append(TensorRange(index, begin - start, bounds[rank] - start))
            begin = bounds[rank]
            shards.append([])
            rank += 1
        shards[-1].append(TensorRange(index, begin - start, tensor.count))
        start = end
    return shards


def _bounds(layout: Layout, most: int, within_tensors: bool) -> list[int]:
    """Return the bounds between shards, rising, counted in elements without padding."""
    candidates = _candidates(layout, within_tensors)
    total = sum(tensor.count for tensor in layout.tensors)
    chosen = (_nearest(candidates, shard * total / most) for shard in range(1, most))
    return [bound for bound, _ in itertools.groupby(chosen) if 0 < bound < total]


def _candidates(layout: Layout, within_tensors: bool) -> list[int]:
    """Return the positions that may become bounds, rising, the ends of the space included."""
    candidates, start = [0], 0
    for tensor in layout.tensors:
        if within_tensors:
            grain, width = GRAIN, tensor.spec.width
            if tensor.spec.table and width:
                grain = -(-GRAIN // width) * width
            candidates += range(start + grain, start + tensor.count - SMALLEST_IN_BLOCKS + 1, grain)
        start += tensor.count
        candidates.append(start)
    return candidates


def _nearest(candidates: list[int], ideal: float) -> int:
    rank = bisect_left(candidates, ideal)
    return min(candidates[max(rank - 1, 0) : rank + 1], key=lambda bound: abs(bound - ideal))
