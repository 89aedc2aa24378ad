"""Adam's t for every tensor of a session, and for the segments that one update moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.tensor_selection import TensorSelection

__all__ = ["CountedSegment", "TensorSteps"]


class CountedSegment(NamedTuple):
    """Neighbouring tensors of one group with the same t: flat elements `[start, end)`.

    Almost always there is one segment a group, so a step is one kernel call a group and chunk, however many tensors.
    Layerwise rules have a segment a tensor. A segment ends where moments are held in another precision.
    """

    start: int
    end: int
    group: int
    t: int


class TensorSteps:
    """Adam's t, tensor by tensor. Almost always all move together, so a step only counts one up."""

    def __init__(self, config: SessionConfig, tensor_steps: Sequence[int]) -> None:
        """Start from the updates that each tensor, in layout order, has had."""
        self._config = config
        self._base = list(tensor_steps)
        self._updates = 0  # of all selected tensors, since _base
        self._selection = config.active
        self._find_segments()

    def tensor_steps(self) -> tuple[int, ...]:
        """Return the updates each tensor has had, in layout order."""
        moved = self._updates
        return tuple(t if index in self._selection.absent else t + moved for index, t in enumerate(self._base))

    def group_steps(self) -> list[int]:
        """Return the most updates that a tensor of each group has had."""
        return [int(max(still, moving + self._updates)) for still, moving in self._group_base]

    def segments(self, selection: TensorSelection) -> list[CountedSegment]:
        """Return the segments that the next update moves, in flat order; their t counts that update."""
        self._follow(selection)
        updates = self._updates + 1
        return [CountedSegment(start, end, group, t + updates) for start, end, group, t in self._segments]

    def advance(self, selection: TensorSelection) -> None:
        """Count one update of the tensors that it moved."""
        self._follow(selection)
        self._updates += 1

    def _follow(self, selection: TensorSelection) -> None:
        """Count from here on for other tensors than before."""
        if selection is not self._selection and selection.absent != self._selection.absent:
            self._base, self._updates, self._selection = list(self.tensor_steps()), 0, selection
            self._find_segments()

    def _find_segments(self) -> None:
        layout, config = self._config.layout, self._config
        alone = config.rule.direction is not None
        bounds = {region.start for region in config.regions}
        self._segments: list[CountedSegment] = []
        self._group_base = _largest_steps(self._selection, self._base)
        for index in self._selection.indices:
            tensor, t = layout.tensors[index], self._base[index]
            last = self._segments[-1] if self._segments else None
            if tensor.count == 0:
                continue
            joins = last and (last.end, last.group, last.t) == (tensor.offset, tensor.spec.group, t)
            if last and joins and not alone and tensor.offset not in bounds:
                self._segments[-1] = last._replace(end=tensor.end)
            else:
                self._segments.append(CountedSegment(tensor.offset, tensor.end, tensor.spec.group, t))


def _largest_steps(selection: TensorSelection, steps: Sequence[int]) -> list[tuple[int, float]]:
    """Return for each group the largest t of tensors that stay, and of those that move (−∞ for none)."""
    groups: list[tuple[int, float]] = [(0, -math.inf)] * len(selection.layout.groups)
    for index, t in enumerate(steps):
        group = selection.layout.tensors[index].spec.group
        still, moving = groups[group]
        groups[group] = (max(still, t), moving) if index in selection.absent else (still, max(moving, t))
    return groups
