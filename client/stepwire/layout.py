"""The flat address space: the offset of each tensor, counted in elements.

Groups lie in index order. The tensors of a group lie one after another, in the order given. A group starts at a
multiple of `GROUP_ALIGNMENT`, so that vector loads and blocks of codes never straddle two groups. A tensor with moments
in blocks starts at such a multiple too, and so does a table. The padding between tensors is never stepped.
Tables are the last tensors of their group, so that dense gradients and replies end before them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

__all__ = [
    "GROUP_ALIGNMENT",
    "SCALE_SUFFIX",
    "SMALLEST_IN_BLOCKS",
    "Layout",
    "Placement",
    "Range",
    "TensorSpec",
    "place",
]

GROUP_ALIGNMENT = 256

SCALE_SUFFIX = "_scale"
"""Beside a slot "s" with 8-bit moments, "s_scale" repeats each block's maximum for its elements."""

IDS_END = 1 << 63
"""One past the largest id of a row."""

SMALLEST_IN_BLOCKS = 4096
"""Tensors of fewer elements keep float32 moments where 8 bits are asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as the client names it.

    Attributes:
        name: the tensor's name, unique within the session.
        shape: the extents, outermost first.
        group: the index of the tensor's parameter group.
        frozen: True for a tensor that the server keeps and never steps.
        state_precision: the precision of the tensor's moments: `"float32"`, `"bfloat16"` or `"int8"`.
        table: the name of the semantics of a table, whose gradients are rows; empty for another tensor.
        uniform_bound: the bound of a table's first parameters; 0 for zeros.
        seed: the seed of these.
        hashed: True for a table whose rows are named by ids; its first extent is its capacity.
        max_age_steps: the steps without a row after which the row may be evicted; 0 for never.
    """

    name: str
    shape: tuple[int, ...]
    group: int = 0
    frozen: bool = False
    state_precision: str = "float32"
    table: str = ""
    uniform_bound: float = 0.0
    seed: int = 0
    hashed: bool = False
    max_age_steps: int = 0

    @property
    def named_rows(self) -> int:
        """One past the largest index of a row, or the largest id where rows are named by ids."""
        return IDS_END if self.hashed else self.shape[0]

    @property
    def width(self) -> int:
        """The number of elements of a row: the product of all extents but the first."""
        return math.prod(self.shape[1:])

    @property
    def count(self) -> int:
        """The number of elements: the product of the shape, 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def held_precision(self) -> str:
        """The precision in which the moments are held: a tensor too small for blocks keeps float32 in place of 8 bits.

        So a tensor with moments in blocks has `"int8"`.
        """
        small = self.state_precision == "int8" and self.count < SMALLEST_IN_BLOCKS
        return "float32" if small else self.state_precision


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

    @functools.cached_property
    def tables(self) -> dict[int, Placement]:
        """The tables by their index in `tensors`."""
        return {index: tensor for index, tensor in enumerate(self.tensors) if tensor.spec.table}

    @functools.cached_property
    def dense_ranges(self) -> tuple[tuple[int, int], ...]:
        """The ranges `(start, end)` of the space outside tables, in order."""
        ranges, done = [], 0
        for table in self.tables.values():
            ranges.append((done, table.offset))
            done = table.end
        return tuple((start, end) for start, end in [*ranges, (done, self.size)] if start < end)

    @functools.cached_property
    def dense_extent(self) -> int:
        """One past the last element outside tables; the size of the space without tables."""
        if not self.tables:
            return self.size
        return self.dense_ranges[-1][1] if self.dense_ranges else 0

    @functools.cached_property
    def dense_size(self) -> int:
        """The number of elements outside tables, padding included."""
        return sum(end - start for start, end in self.dense_ranges)

    def dense_place(self, element: int) -> int:
        """Return the number of elements outside tables before a flat element."""
        if not self.tables:
            return element
        return sum(min(end, element) - start for start, end in self.dense_ranges if start < element)

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


def place(specs: Sequence[TensorSpec], group_count: int) -> Layout:
    """Lay tensors out. The layout is deterministic, so that a client may compute it too.

    Args:
        specs: the tensors, in order; each with moments in blocks starts a block.
        group_count: the number of groups.

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
        for spec in sorted(group, key=lambda spec: bool(spec.table)):
            offset = _aligned(end) if spec.table or spec.held_precision == "int8" else end
            tensors.append(Placement(spec, offset, spec.count))
            end = offset + spec.count
        groups.append(Range(start, end - start))
    in_8_bits = any(tensor.spec.state_precision == "int8" for tensor in tensors)
    return Layout(tuple(tensors), tuple(groups), end, GROUP_ALIGNMENT if in_8_bits else 1, tuple(names))


def _aligned(offset: int) -> int:
    return -(-offset // GROUP_ALIGNMENT) * GROUP_ALIGNMENT
