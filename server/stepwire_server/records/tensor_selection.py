"""The tensors that a step moves, and their segments of the flat space."""

from __future__ import annotations

import functools
from typing import NamedTuple

from stepwire.layout import Layout

__all__ = ["Segment", "TensorSelection"]


class Segment(NamedTuple):
    """Flat elements `[start, end)` of one group, all of tensors that the step moves."""

    start: int
    end: int
    group: int


class TensorSelection:
    """The tensors of a layout but for some.

    Attributes:
        layout: the layout of all tensors.
        absent: the indices of tensors that stay as they are: no gradient is needed, and one that comes is ignored.
        whole: tables are moved whole, as by a load, and not by rows.
    """

    def __init__(self, layout: Layout, absent: frozenset[int], *, whole: bool = False) -> None:
        """Leave out the tensors with indices `absent`."""
        self.layout = layout
        self.absent = absent
        self.whole = whole

    @functools.cached_property
    def indices(self) -> tuple[int, ...]:
        """The tensors that move, in layout order."""
        return tuple(index for index in range(len(self.layout.tensors)) if index not in self.absent)

    @functools.cached_property
    def tables(self) -> tuple[int, ...]:
        """The tables that move by rows, by index."""
        return () if self.whole else tuple(index for index in self.layout.tables if index not in self.absent)

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The segments of the tensors that move otherwise: neighbours of one group merged, in flat order."""
        found: list[Segment] = []
        tables = frozenset(self.tables)
        for index in self.indices:
            tensor = self.layout.tensors[index]
            if not tensor.count or index in tables:
                continue
            last = found[-1] if found else None
            if last and (last.end, last.group) == (tensor.offset, tensor.spec.group):
                found[-1] = last._replace(end=tensor.end)
            else:
                found.append(Segment(tensor.offset, tensor.end, tensor.spec.group))
        return tuple(found)
