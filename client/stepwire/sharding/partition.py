"""Which elements of a model each shard holds: chosen when sessions are created, and read again from them alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence

from stepwire.errors import InvalidRequestError
from stepwire.layout import Layout, TensorSpec, place
from stepwire.packing import Flat
from stepwire.sharding.cutting import Slice, cut
from stepwire.sharding.naming import Origin, origin_of, slice_spec

__all__ = ["Partition", "Share"]


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
