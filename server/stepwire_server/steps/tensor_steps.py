"""How far a session is: Adam's t for every range of it, and the record of the last step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.tensor_selection import TensorSelection

__all__ = ["CountedSegment", "TensorSteps"]


class CountedSegment(NamedTuple):
    """Neighbouring tensors of one group with the same t: flat elements `[start, end)`.

    Almost always one run a group, so a step is one kernel call a group and chunk, however many tensors. Layerwise rules
    have a run a tensor, and 8-bit moments split runs where small tensors keep float32.
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
        self._updates = 0  # of all active tensors, since _base
        self._active = config.active
        self._find_runs()

    def tensor_steps(self) -> tuple[int, ...]:
        """Return the updates each tensor has had, in layout order."""
        moved = self._updates
        return tuple(t if index in self._active.absent else t + moved for index, t in enumerate(self._base))

    def group_steps(self) -> list[int]:
        """Return the most updates that a tensor of each group has had."""
        return [int(max(still, moving + self._updates)) for still, moving in self._group_base]

    def runs(self, active: TensorSelection) -> list[CountedSegment]:
        """Return the runs of the tensors that the next update moves, in flat order; their t counts that update."""
        self._follow(active)
        updates = self._updates + 1
        return [CountedSegment(start, end, group, t + updates) for start, end, group, t in self._runs]

    def advance(self, active: TensorSelection) -> None:
        """Count one update of the tensors that it moved."""
        self._follow(active)
        self._updates += 1

    def _follow(self, active: TensorSelection) -> None:
        """Count from here on for other tensors than before."""
        if active is not self._active and active.absent != self._active.absent:
            self._base, self._updates, self._active = list(self.tensor_steps()), 0, active
            self._find_runs()

    def _find_runs(self) -> None:
        layout, config = self._config.layout, self._config
        alone = config.rule.direction is not None
        bounds = {bound for span in config.kept for bound in span}
        self._runs: list[CountedSegment] = []
        self._group_base = _largest_steps(self._active, self._base)
        for index in self._active.indices:
            tensor, t = layout.tensors[index], self._base[index]
            last = self._runs[-1] if self._runs else None
            if tensor.count == 0:
                continue
            joins = last and (last.end, last.group, last.t) == (tensor.offset, tensor.spec.group, t)
            if last and joins and not alone and tensor.offset not in bounds:
                self._runs[-1] = last._replace(end=tensor.end)
            else:
                self._runs.append(CountedSegment(tensor.offset, tensor.end, tensor.spec.group, t))


def _largest_steps(active: TensorSelection, steps: Sequence[int]) -> list[tuple[int, float]]:
    """Return for each group the largest t of tensors that stay, and of those that move (−∞ for none)."""
    groups: list[tuple[int, float]] = [(0, -math.inf)] * len(active.layout.groups)
    for index, t in enumerate(steps):
        group = active.layout.tensors[index].spec.group
        still, moving = groups[group]
        groups[group] = (max(still, t), moving) if index in active.absent else (still, max(moving, t))
    return groups
