"""How far a session is: Adam's t for every range of it, and the record of the last step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from stepwire.optimizers import Hyperparameters
from stepwire_server.active import Active
from stepwire_server.loss_scale import LossScale
from stepwire_server.plan import SessionPlan

__all__ = ["GroupRecord", "Progress", "Run", "Snapshot", "StepRecord"]


class Run(NamedTuple):
    """Neighbouring tensors of one group with the same t: flat elements `[start, end)`.

    Almost always one run a group, so a step is one kernel call a group and chunk, however many tensors. Layerwise rules
    have a run a tensor, and 8-bit moments split runs where small tensors keep float32.
    """

    start: int
    end: int
    group: int
    t: int


class Progress:
    """Adam's t, tensor by tensor. Almost always all move together, so a step only counts one up."""

    def __init__(self, plan: SessionPlan, tensor_steps: Sequence[int]) -> None:
        """Start from the updates that each tensor, in layout order, has had."""
        self._plan = plan
        self._base = list(tensor_steps)
        self._updates = 0  # of all active tensors, since _base
        self._active = plan.active
        self._find_runs()

    def tensor_steps(self) -> tuple[int, ...]:
        """Return the updates each tensor has had, in layout order."""
        moved = self._updates
        return tuple(t if index in self._active.absent else t + moved for index, t in enumerate(self._base))

    def group_steps(self) -> list[int]:
        """Return the most updates that a tensor of each group has had."""
        return [int(max(still, moving + self._updates)) for still, moving in self._group_base]

    def runs(self, active: Active) -> list[Run]:
        """Return the runs of the tensors that the next update moves, in flat order; their t counts that update."""
        self._follow(active)
        updates = self._updates + 1
        return [Run(start, end, group, t + updates) for start, end, group, t in self._runs]

    def advance(self, active: Active) -> None:
        """Count one update of the tensors that it moved."""
        self._follow(active)
        self._updates += 1

    def _follow(self, active: Active) -> None:
        """Count from here on for other tensors than before."""
        if active is not self._active and active.absent != self._active.absent:
            self._base, self._updates, self._active = list(self.tensor_steps()), 0, active
            self._find_runs()

    def _find_runs(self) -> None:
        layout, plan = self._plan.layout, self._plan
        alone = plan.rule.direction is not None
        bounds = {bound for span in plan.kept for bound in span}
        self._runs: list[Run] = []
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
                self._runs.append(Run(tensor.offset, tensor.end, tensor.spec.group, t))


def _largest_steps(active: Active, steps: Sequence[int]) -> list[tuple[int, float]]:
    """Return for each group the largest t of tensors that stay, and of those that move (−∞ for none)."""
    groups: list[tuple[int, float]] = [(0, -math.inf)] * len(active.layout.groups)
    for index, t in enumerate(steps):
        group = active.layout.tensors[index].spec.group
        still, moving = groups[group]
        groups[group] = (max(still, t), moving) if index in active.absent else (still, max(moving, t))
    return groups


class Snapshot(NamedTuple):
    """One moment of a session.

    Attributes:
        step: its last committed step.
        load: its last committed load.
        tensor_steps: updates each tensor has had (Adam's t), in layout order.
        loss_scale: where loss scaling stands; None without it.
    """

    step: int
    load: int
    tensor_steps: tuple[int, ...]
    loss_scale: LossScale | None


class GroupRecord(NamedTuple):
    """What one group's part of a step was.

    Attributes:
        grad_norm: Euclidean norm of the group's gradient before clipping.
        hyperparameters: the values used.
        t: updates the group has had, this one included.
        clipped_grad_norm: after clipping.
        clip_coefficient: by norm clipping, its own and the global one together.
        update_norm: of its parameters' change; None where it was not measured or nothing was updated.
        param_norm: of its parameters after the step; None likewise.
    """

    grad_norm: float
    hyperparameters: Hyperparameters
    t: int
    clipped_grad_norm: float = 0.0
    clip_coefficient: float = 1.0
    update_norm: float | None = None
    param_norm: float | None = None


class StepRecord(NamedTuple):
    """What a committed step did; kept so that a replay returns it again.

    Attributes:
        step: its number.
        epoch: the epoch that applied it.
        skipped: nothing was updated because the gradient was not finite.
        grad_norm: Euclidean norm of the whole gradient before clipping.
        non_finite_count: gradient elements that were NaN or Inf.
        groups: one record a group.
        receive_seconds: from its first frame to its commit.
        queue_seconds: waiting for the session.
        apply_seconds: decode, rule and encode.
        accumulated: the gradient was added to those before it and nothing was updated.
        clipped_grad_norm: after clipping.
        clip_coefficient: of clipping by the global norm.
        update_norm: of the parameters' change; None where it was not measured or nothing was updated.
        param_norm: of the parameters after the step; None likewise.
        loss_scale: for the next step; None without loss scaling.
        replayed: it had been applied before.
    """

    step: int
    epoch: int
    skipped: bool
    grad_norm: float
    non_finite_count: int
    groups: tuple[GroupRecord, ...]
    receive_seconds: float
    queue_seconds: float
    apply_seconds: float
    accumulated: bool = False
    clipped_grad_norm: float = 0.0
    clip_coefficient: float = 1.0
    update_norm: float | None = None
    param_norm: float | None = None
    loss_scale: float | None = None
    replayed: bool = False

    def replay(self) -> StepRecord:
        """Return the record as a replay answers it."""
        return self._replace(replayed=True)
