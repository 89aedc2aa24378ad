"""How far a session is: Adam's t for every range of it, and the record of the last step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stepwire.layout import Layout
from stepwire.optimizers import Adam, Hyperparameters
from stepwire_server import rules

__all__ = ["GroupRecord", "Run", "Snapshot", "StepRecord", "SteppedRun", "runs_of"]


class SteppedRun(NamedTuple):
    """A run with the formula and the scalars of one step."""

    run: Run
    rule: rules.Rule
    scalars: tuple[float, ...]


class Run(NamedTuple):
    """Neighbouring tensors of one group with the same t: flat elements `[start, end)`.

    Almost always one run a group, so a step is one kernel call a group and chunk, however many tensors.
    """

    start: int
    end: int
    group: int
    t: int

    def next(self) -> Run:
        """Return the run after one more update."""
        return self._replace(t=self.t + 1)

    def stepped(self, optimizer: Adam, hyper: Hyperparameters) -> SteppedRun:
        """Add what the next update needs."""
        rule = rules.rule_for(optimizer, hyper)
        return SteppedRun(self, rule, rule.scalars(hyper, self.t + 1))


def runs_of(layout: Layout, tensor_steps: Sequence[int]) -> list[Run]:
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
    apply_seconds: float = 0.0
    replayed: bool = False

    def applied(self, seconds: float) -> StepRecord:
        """Return the record with the time its pass took."""
        return self._replace(apply_seconds=seconds)

    def replay(self) -> StepRecord:
        """Return the record as a replay answers it."""
        return self._replace(replayed=True)
