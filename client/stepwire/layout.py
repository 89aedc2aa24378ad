"""The flat address space: the offset of each tensor, counted in elements.

Groups lie in index order. The tensors of a group lie one after another, in the order given. A group starts at a
multiple of `GROUP_ALIGNMENT`, so that vector loads and blocks of codes never straddle two groups. A tensor with moments
in blocks starts at such a multiple too. The padding between tensors is never stepped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

__all__ = ["GROUP_ALIGNMENT", "SMALLEST_IN_BLOCKS", "Layout", "Placement", "Range", "TensorSpec", "place"]

GROUP_ALIGNMENT = 256

SMALLEST_IN_BLOCKS = 4096
"""Tensors of fewer elements keep float32 moments in a session with 8-bit moments in blocks."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as the client names it.

    Attributes:
        name: the tensor's name, unique within the session.
        shape: the extents, outermost first.
        group: the index of the tensor's parameter group.
        frozen: True for a tensor that the server keeps and never steps.
    """

    name: str
    shape: tuple[int, ...]
    group: int = 0
    frozen: bool = False

    @property
    def count(self) -> int:
        """The number of elements: the product of the shape, 1 for a scalar."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """The place of one tensor: flat elements `[offset, offset + count)`."""

    spec: TensorSpec
    offset: int
    count: int

    @property
    def end(self) -> int:
        """One past the last flat element."""
        return self.offset + self.count


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """A range of flat elements `[offset, offset + count)`."""

    offset: int
    count: int

    @property
    def end(self) -> int:
        """One past the last flat element."""
        return self.offset + self.count


@dataclasses.dataclass(frozen=True)
class Layout:
    """The flat space of one session.

    Attributes:
        tensors: the tensors, by offset.
        groups: the range of each group, in index order.
        size: the number of elements, padding included.
        chunk_alignment: the number of elements that the offset of every chunk is a multiple of.
        names: the names of the tensors in the order of their creation, as users have them; empty if it is unknown.
    """

    tensors: tuple[Placement, ...]
    groups: tuple[Range, ...]
    size: int
    chunk_alignment: int = 1
    names: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @functools.cached_property
    def _offsets(self) -> list[int]:
        return [tensor.offset for tensor in self.tensors]

    def overlapping(self, start: int, end: int) -> Iterator[Placement]:
        """Yield the non-empty tensors that overlap `[start, end)`, in order."""
        first = max(bisect_right(self._offsets, start) - 1, 0)
        for tensor in self.tensors[first:]:
            if tensor.offset >= end:
                return
            if tensor.end > start and tensor.count:
                yield tensor

    def tensor_indices(self) -> dict[str, int]:
        """Map each name to its index in `tensors`."""
        return {tensor.spec.name: index for index, tensor in enumerate(self.tensors)}


def place(specs: Sequence[TensorSpec], group_count: int, *, in_blocks: bool = False) -> Layout:
    """Lay tensors out. The layout is deterministic, so that a client may compute it too.

    Args:
        specs: the tensors, in order.
        group_count: the number of groups.
        in_blocks: True for a session with moments in blocks: each tensor of at least `SMALLEST_IN_BLOCKS` elements
            starts a block.

    Returns:
        The layout.
    """
    members: list[list[TensorSpec]] = [[] for _ in range(group_count)]
    names: list[str] = []
    for spec in specs:
        members[spec.group].append(spec)
        names.append(spec.name)
    tensors: list[Placement] = []
    groups: list[Range] = []
    end = 0
    for group in members:
        start = end = _aligned(end)
        for spec in group:
            offset = _aligned(end) if in_blocks and spec.count >= SMALLEST_IN_BLOCKS else end
            tensors.append(Placement(spec, offset, spec.count))
            end = offset + spec.count
        groups.append(Range(start, end - start))
    return Layout(tuple(tensors), tuple(groups), end, GROUP_ALIGNMENT if in_blocks else 1, tuple(names))


def _aligned(offset: int) -> int:
    return -(-offset // GROUP_ALIGNMENT) * GROUP_ALIGNMENT
