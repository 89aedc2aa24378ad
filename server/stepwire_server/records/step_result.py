"""The result of a step, in the domain's own terms."""

from __future__ import annotations

from typing import NamedTuple

from stepwire.optimizers import Hyperparameters
from stepwire_server.records.round_result import RoundResult

__all__ = ["GroupResult", "StepResult", "StepTimes"]


class GroupResult(NamedTuple):
    """The part of one parameter group in a step.

    Attributes:
        grad_norm: the Euclidean norm of the group's gradient before clipping.
        hyperparameters: the values used.
        t: the updates the group has had, this one included.
        clipped_grad_norm: the norm after clipping.
        clip_coefficient: the factor of norm clipping, the group's own and the global one together.
        update_norm: the norm of the parameters' change; None where it was not measured or nothing was updated.
        param_norm: the norm of the parameters after the step; None likewise.
    """

    grad_norm: float
    hyperparameters: Hyperparameters
    t: int
    clipped_grad_norm: float = 0.0
    clip_coefficient: float = 1.0
    update_norm: float | None = None
    param_norm: float | None = None


class StepTimes(NamedTuple):
    """The stages of a step, in seconds.

    Attributes:
        receive: from the step's first message to its commit message.
        queue: waiting for a worker thread and for the session.
        apply: decode, rule and encode.
        reduce: making one gradient of those of several workers; 0 for one worker.
    """

    receive: float
    queue: float
    apply: float
    reduce: float = 0.0


class StepResult(NamedTuple):
    """The effect of a committed step; kept so that a replay returns it again.

    Attributes:
        step: the step's number.
        epoch: the epoch that applied it.
        skipped: nothing was updated because the gradient, or the sum of accumulated ones, was not finite.
        grad_norm: the Euclidean norm of the whole gradient before clipping; at the end of an accumulation, of the sum.
        non_finite_count: the elements of the same gradient that were NaN or Inf.
        groups: one result a group, in index order.
        times: the stages of the step.
        accumulated: the gradient was added to those before it and nothing was updated.
        clipped_grad_norm: the norm after clipping.
        clip_coefficient: the factor of clipping by the global norm.
        update_norm: the norm of the parameters' change; None where it was not measured or nothing was updated.
        param_norm: the norm of the parameters after the step; None likewise.
        loss_scale: the scale for the next step; None without loss scaling.
        replayed: the step had been applied before.
        round: the part of this worker's contribution; None without aggregation.
    """

    step: int
    epoch: int
    skipped: bool
    grad_norm: float
    non_finite_count: int
    groups: tuple[GroupResult, ...]
    times: StepTimes
    accumulated: bool = False
    clipped_grad_norm: float = 0.0
    clip_coefficient: float = 1.0
    update_norm: float | None = None
    param_norm: float | None = None
    loss_scale: float | None = None
    replayed: bool = False
    round: RoundResult | None = None

    def replay(self) -> StepResult:
        """Return the result for the reply to a replay."""
        return self._replace(replayed=True)
