"""The elements of a model that each shard holds: chosen when sessions are created, and read again from them alone.

The flat space is cut into one contiguous range a shard. Small tensors and those of layerwise rules stay whole. A large
tensor is cut at multiples of `GRAIN` of its own elements, and never so that a small remainder is left. So 8-bit moments
have the blocks that they have in the whole, and no range is held in another precision than its tensor would be.
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
from stepwire.sharding.slice_names import Origin, origin_of, slice_spec

__all__ = ["GRAIN", "Partition", "Share", "Slice", "cut"]


GRAIN: Final = 65_536
"""Tensors are cut at multiples of this, in elements."""


class Slice(NamedTuple):
    """Elements `[begin, end)` of the tensor with index `tensor` in the layout of the whole."""

    tensor: int
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Share:
    """What one shard holds.

    Attributes:
        slices: in the order of the layout of its session.
    """

    slices: tuple[Slice, ...]

    def of(self, flat: Flat) -> Flat:
        """Return views of the share of 1-D arrays in layout order; of an array that is empty, empty ones."""
        return [flat[piece.tensor][piece.begin : piece.end] for piece in self.slices]

    def indices(self, tensors: Iterable[int]) -> list[int]:
        """Return the indices in the shard's layout of what it holds of some tensors of the whole, in their order."""
        return [self._ranks[tensor] for tensor in tensors if tensor in self._ranks]

    @functools.cached_property
    def _ranks(self) -> dict[int, int]:
        return {piece.tensor: index for index, piece in enumerate(self.slices)}


@dataclasses.dataclass(frozen=True)
class Partition:
    """A model cut over shards.

    Attributes:
        layout: of the whole, as one session would have it.
        shares: one a shard, in flat order.
    """

    layout: Layout
    shares: tuple[Share, ...]

    @classmethod
    def make(cls, layout: Layout, most: int, *, within_tensors: bool) -> Partition:
        """Cut a model; see `cut`."""
        shards = cut(layout, most, within_tensors=within_tensors)
        return cls(layout, tuple(Share(tuple(slices)) for slices in shards))

    @classmethod
    def read(cls, layouts: Sequence[Layout]) -> Partition:
        """Find the whole again from the layouts of the shards' sessions, in order.

        Raises:
            InvalidRequestError: they are not the parts of one model in order.
        """
        found: dict[str, list[tuple[Origin, TensorSpec]]] = {}
        for origin, spec in _in_flat_order(layouts):
            found.setdefault(origin.name, []).append((origin, spec))
        specs = [_whole(pieces) for pieces in found.values()]
        ranks = {spec.name: index for index, spec in enumerate(specs)}
        shares = [
            Share(tuple(Slice(ranks[piece.name], piece.begin, piece.end) for piece in map(origin_of, _specs(layout))))
            for layout in layouts
        ]
        in_blocks = any(layout.chunk_alignment > 1 for layout in layouts)
        return cls(place(specs, len(layouts[0].groups), in_blocks=in_blocks), tuple(shares))

    def specs(self, shard: int) -> list[TensorSpec]:
        """Return the tensors of a shard's session.

        Raises:
            InvalidRequestError: a name becomes too long.
        """
        tensors = self.layout.tensors
        return [slice_spec(tensors[piece.tensor].spec, piece.begin, piece.end) for piece in self.shares[shard].slices]


def _specs(layout: Layout) -> list[TensorSpec]:
    return [tensor.spec for tensor in layout.tensors]


def _in_flat_order(layouts: Sequence[Layout]) -> Iterator[tuple[Origin, TensorSpec]]:
    """Yield every piece with its origin, in the flat order of the whole: group by group."""
    if any(len(layout.groups) != len(layouts[0].groups) for layout in layouts):
        raise _foreign("they have different numbers of parameter groups")
    for group in range(len(layouts[0].groups)):
        for layout in layouts:
            yield from ((origin_of(spec), spec) for spec in _specs(layout) if spec.group == group)


def _whole(pieces: Sequence[tuple[Origin, TensorSpec]]) -> TensorSpec:
    """Return the tensor that its pieces, in order, add up to."""
    first, spec = pieces[0]
    reached = 0
    for origin, other in pieces:
        alike = (origin.shape, other.group, other.frozen) == (first.shape, spec.group, spec.frozen)
        if not alike or origin.begin != reached:
            raise _foreign(f"tensor {first.name!r} is in pieces that do not follow each other")
        reached = origin.end
    if reached != math.prod(first.shape):
        raise _foreign(f"of tensor {first.name!r} there are {reached} of {math.prod(first.shape)} elements")
    return TensorSpec(first.name, first.shape, spec.group, spec.frozen)


def _foreign(problem: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"session_id: these sessions are not the shards of one model: {problem}; give all its ids, in the order in "
        "which `ShardedSession.session_id` has them",
        metadata={"field": "session_id"},
    )


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
