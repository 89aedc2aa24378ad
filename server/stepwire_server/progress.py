"""How far a session is: Adam's t for every range of it, and the record of the last step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stepwire.layout import Layout
from stepwire.optimizers import Adam, Hyperparameters
from stepwire_server import rules

__all__ = ["GroupRecord", "Progress", "Run", "Snapshot", "StepRecord", "SteppedRun"]


class Run(NamedTuple):
    """Neighbouring tensors of one group with the same t: flat elements `[start, end)`.

    Almost always one run a group, so a step is one kernel call a group and chunk, however many tensors.
    """

    start: int
    end: int
    group: int
    t: int


class SteppedRun(NamedTuple):
    """Flat elements `[start, end)` with the formula and the scalars of one step."""

    start: int
    end: int
    rule: rules.Rule
    scalars: tuple[float, ...]


class Progress:
    """Adam's t, tensor by tensor. All tensors move together, so a step only counts one up."""

    def __init__(self, layout: Layout, tensor_steps: Sequence[int]) -> None:
        """Start from the updates that each tensor, in layout order, has had."""
        self._base = tuple(tensor_steps)
        self._updates = 0
        self._runs = _runs_of(layout, tensor_steps)
        self._group_base = [0] * len(layout.groups)
        for tensor, t in zip(layout.tensors, tensor_steps, strict=True):
            self._group_base[tensor.spec.group] = max(self._group_base[tensor.spec.group], t)

    def tensor_steps(self) -> tuple[int, ...]:
        """Return the updates each tensor has had, in layout order."""
        return tuple(t + self._updates for t in self._base)

    def group_steps(self) -> list[int]:
        """Return the most updates that a tensor of each group has had."""
        return [t + self._updates for t in self._group_base]

    def next_step(self, optimizer: Adam, groups: Sequence[Hyperparameters]) -> list[SteppedRun]:
        """Return what the next update needs, range by range in flat order."""
        stepped = []
        for run in self._runs:
            hyper = groups[run.group]
            rule = rules.rule_for(optimizer, hyper)
            scalars = rule.scalars(hyper, run.t + self._updates + 1)
            stepped.append(SteppedRun(run.start, run.end, rule, scalars))
        return stepped

    def advance(self) -> None:
        """Count one update of every tensor."""
        self._updates += 1


def _runs_of(layout: Layout, tensor_steps: Sequence[int]) -> list[Run]:
    """Merge neighbouring tensors of one group with the same t."""
    runs: list[Run] = []
    for tensor, t in zip(layout.tensors, tensor_steps, strict=True):
        if tensor.count == 0:
            continue
        last = runs[-1] if runs else None
        if last and (last.end, last.group, last.t) == (tensor.offset, tensor.spec.group, t):
            runs[-1] = last._replace(end=tensor.end)
        else:
            runs.append(Run(tensor.offset, tensor.end, tensor.spec.group, t))
    return runs


class Snapshot(NamedTuple):
    """One moment of a session.

    Attributes:
        step: its last committed step.
        load: its last committed load.
        tensor_steps: updates each tensor has had (Adam's t), in layout order.
    """

    step: int
    load: int
    tensor_steps: tuple[int, ...]


class GroupRecord(NamedTuple):
    """What one group's part of a step was.

    Attributes:
        grad_norm: Euclidean norm of the group's gradient.
        hyperparameters: the values used.
        t: updates the group has had, this one included.
    """

    grad_norm: float
    hyperparameters: Hyperparameters
    t: int


class StepRecord(NamedTuple):
    """What a committed step did; kept so that a replay returns it again.

    Attributes:
        step: its number.
        epoch: the epoch that applied it.
        skipped: nothing was updated because the gradient was not finite.
        grad_norm: Euclidean norm of the whole gradient.
        non_finite_count: gradient elements that were NaN or Inf.
        groups: one record a group.
        receive_seconds: from its first frame to its commit.
        queue_seconds: waiting for the session.
        apply_seconds: decode, rule and encode.
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
    replayed: bool = False

    def replay(self) -> StepRecord:
        """Return the record as a replay answers it."""
        return self._replace(replayed=True)
