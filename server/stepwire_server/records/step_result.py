"""What a step did, as the engine and the norms tell it; the session makes the record of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from stepwire.optimizers import Hyperparameters
from stepwire.optimizers.norms import GradientNorms
from stepwire_server.records.session_config import SessionConfig

__all__ = ["GroupResult", "Outcome", "StepResult", "updated"]


class Outcome(NamedTuple):
    """What a step did.

    Attributes:
        updated: the parameters were stepped.
        skipped: nothing changed because the gradient was not finite.
        groups: the numbers of each group.
        norms: of the gradient, with the factors of clipping.
        clipped: norm of each group's gradient after all clipping.
        clipped_total: of the whole gradient after all clipping.
        update_norms: of each group's change; empty where it was not measured.
        param_norms: of each group's new parameters; empty likewise.
        non_finite_count: gradient elements that were NaN or Inf.
    """

    updated: bool
    skipped: bool
    groups: tuple[Hyperparameters, ...]
    norms: GradientNorms
    clipped: tuple[float, ...]
    clipped_total: float
    update_norms: tuple[float, ...]
    param_norms: tuple[float, ...]
    non_finite_count: int

    def record(
        self, step: int, epoch: int, t: list[int], times: tuple[float, float, float], loss_scale: float | None
    ) -> StepResult:
        """Return the record of the step, given what the session knows."""
        measured = bool(self.update_norms)
        unknown: Sequence[None] = (None,) * len(self.groups)
        norms = self.norms
        groups = map(
            GroupResult,
            norms.groups,
            self.groups,
            t,
            self.clipped,
            norms.coefficients,
            self.update_norms if measured else unknown,
            self.param_norms if measured else unknown,
        )
        return StepResult(
            step=step,
            epoch=epoch,
            skipped=self.skipped,
            grad_norm=norms.total,
            non_finite_count=self.non_finite_count,
            groups=tuple(groups),
            receive_seconds=times[0],
            queue_seconds=times[1],
            apply_seconds=times[2],
            accumulated=not (self.updated or self.skipped),
            clipped_grad_norm=self.clipped_total,
            clip_coefficient=norms.coefficient,
            update_norm=_together(self.update_norms) if measured else None,
            param_norm=_together(self.param_norms) if measured else None,
            loss_scale=loss_scale,
        )


def updated(
    config: SessionConfig,
    groups: tuple[Hyperparameters, ...],
    norms: GradientNorms,
    measured: Sequence[Sequence[float]],
    non_finite_count: int,
) -> Outcome:
    """Return the outcome of a step that changed the state.

    Args:
        config: the session's.
        groups: the numbers that were used.
        norms: of the gradient.
        measured: of each group, what `Update.norms` returns.
        non_finite_count: gradient elements that were NaN or Inf.
    """
    clipped, total = norms.clipped(), norms.left * norms.coefficient
    if config.treatment.clip_grad_value is not None:
        clipped = tuple([column[2] if column else 0.0 for column in measured])
        total = _together(clipped)
    updates: tuple[float, ...] = ()
    params: tuple[float, ...] = ()
    if config.measures:
        updates = tuple([column[0] if column else 0.0 for column in measured])
        params = tuple([column[1] if column else 0.0 for column in measured])
    return Outcome(True, False, groups, norms, clipped, total, updates, params, non_finite_count)


def _together(norms: tuple[float, ...]) -> float:
    return norms[0] if len(norms) == 1 else math.hypot(*norms)


class GroupResult(NamedTuple):
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


class StepResult(NamedTuple):
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
    groups: tuple[GroupResult, ...]
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

    def replay(self) -> StepResult:
        """Return the record as a replay answers it."""
        return self._replace(replayed=True)
