"""What a step did, as the engine and the norms tell it; the session makes the record of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from stepwire.norms import GradientNorms
from stepwire.optimizers import Hyperparameters
from stepwire_server.plan import SessionPlan
from stepwire_server.progress import GroupRecord, StepRecord

__all__ = ["Outcome", "updated"]


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
    ) -> StepRecord:
        """Return the record of the step, given what the session knows."""
        measured = bool(self.update_norms)
        unknown: Sequence[None] = (None,) * len(self.groups)
        norms = self.norms
        groups = map(
            GroupRecord,
            norms.groups,
            self.groups,
            t,
            self.clipped,
            norms.coefficients,
            self.update_norms if measured else unknown,
            self.param_norms if measured else unknown,
        )
        return StepRecord(
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
    plan: SessionPlan,
    groups: tuple[Hyperparameters, ...],
    norms: GradientNorms,
    measured: Sequence[Sequence[float]],
    non_finite_count: int,
) -> Outcome:
    """Return the outcome of a step that changed the state.

    Args:
        plan: the session's.
        groups: the numbers that were used.
        norms: of the gradient.
        measured: of each group, what `Update.norms` returns.
        non_finite_count: gradient elements that were NaN or Inf.
    """
    clipped, total = norms.clipped(), norms.left * norms.coefficient
    if plan.treatment.clip_grad_value is not None:
        clipped = tuple([column[2] if column else 0.0 for column in measured])
        total = _together(clipped)
    updates: tuple[float, ...] = ()
    params: tuple[float, ...] = ()
    if plan.measures:
        updates = tuple([column[0] if column else 0.0 for column in measured])
        params = tuple([column[1] if column else 0.0 for column in measured])
    return Outcome(True, False, groups, norms, clipped, total, updates, params, non_finite_count)


def _together(norms: tuple[float, ...]) -> float:
    return norms[0] if len(norms) == 1 else math.hypot(*norms)
