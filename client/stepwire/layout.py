"""The flat address space: where each tensor lies, counted in elements.

Groups lie in index order, the tensors of a group one after another in the order given. A group starts at a
multiple of `GROUP_ALIGNMENT`, so that vector loads and blockwise codes never straddle two groups; so does each tensor
whose moments are held in blocks. The padding between is never stepped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

__all__ = ["GROUP_ALIGNMENT", "SMALLEST_IN_BLOCKS", "Layout", "Placement", "Span", "TensorSpec", "place"]

GROUP_ALIGNMENT = 256

SMALLEST_IN_BLOCKS = 4096
"""Tensors of fewer elements keep float32 moments where the others have blockwise ones."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as the client names it.

    Attributes:
        name: unique within the session.
        shape: extents, outermost first.
        group: index of its parameter group.
        frozen: held, never stepped.
    """

    name: str
    shape: tuple[int, ...]
    group: int = 0
    frozen: bool = False

    @property
    def count(self) -> int:
        """Elements: the product of the shape, 1 for a scalar."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor lies: flat elements `[offset, offset + count)`."""

    spec: TensorSpec
    offset: int
    count: int

    @property
    def end(self) -> int:
        """One past the last flat element."""
        return self.offset + self.count


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A range of flat elements `[offset, offset + count)`."""

    offset: int
    count: int

    @property
    def end(self) -> int:
        """One past the last flat element."""
        return self.offset + self.count


@dataclasses.dataclass(frozen=True)
class Layout:
    """The whole space.

    Attributes:
        tensors: ordered by offset.
        groups: in index order.
        size: elements, padding included.
        chunk_alignment: chunks of a step start at multiples of this.
    """

    tensors: tuple[Placement, ...]
    groups: tuple[Span, ...]
    size: int
    chunk_alignment: int = 1

    @functools.cached_property
    def _offsets(self) -> list[int]:
        return [tensor.offset for tensor in self.tensors]

    def overlapping(self, start: int, end: int) -> Iterator[Placement]:
        """Yield the non-empty tensors that share elements with `[start, end)`, in order."""
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
    """Lay tensors out; deterministic, so that a client may compute it too.

    Args:
        specs: the tensors, in order.
        group_count: how many groups there are.
        in_blocks: moments are held in blocks, which start with each tensor of `SMALLEST_IN_BLOCKS` elements or more.
    """
    members: list[list[TensorSpec]] = [[] for _ in range(group_count)]
    for spec in specs:
        members[spec.group].append(spec)
    tensors: list[Placement] = []
    groups: list[Span] = []
    end = 0
    for group in members:
        start = end = _aligned(end)
        for spec in group:
            offset = _aligned(end) if in_blocks and spec.count >= SMALLEST_IN_BLOCKS else end
            tensors.append(Placement(spec, offset, spec.count))
            end = offset + spec.count
        groups.append(Span(start, end - start))
    return Layout(tuple(tensors), tuple(groups), end, GROUP_ALIGNMENT if in_blocks else 1)


def _aligned(offset: int) -> int:
    return -(-offset // GROUP_ALIGNMENT) * GROUP_ALIGNMENT
