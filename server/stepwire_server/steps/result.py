"""The result of a step, from its check and from the sums of its passes."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import NamedTuple

from stepwire_server.records.step_result import GroupResult, StepResult, StepTimes
from stepwire_server.steps.check_gradient import GradientCheck
from stepwire_server.steps.step import SteppedState

__all__ = ["Effect", "Moment", "step_result"]


class Effect(enum.Enum):
    """The effect of a step on the state."""

    UPDATED = "the parameters were stepped"
    ACCUMULATED = "the gradient was added to those before it"
    SKIPPED = "nothing was updated, because the gradient was not finite, and an accumulation was dropped"


class Moment(NamedTuple):
    """The number of a step, the epoch that committed it, and the times of its stages."""

    step: int
    epoch: int
    times: StepTimes


def step_result(
    state: SteppedState, check: GradientCheck, effect: Effect, measured: Sequence[Sequence[float]], moment: Moment
) -> StepResult:
    """Return the result of a step that has changed the state.

    Args:
        state: the session's state, after the step.
        check: of the step's gradient.
        effect: the effect of the step.
        measured: for each group the norms of `Update.norms`; empty where nothing was updated.
        moment: of the commit.
    """
    norms, clipped, total = check.norms, check.norms.clipped(), check.norms.left * check.norms.coefficient
    updates: Sequence[float | None] = (None,) * len(check.groups)
    params, update_norm, param_norm = updates, None, None
    if effect is Effect.UPDATED:
        if state.config.treatment.clip_grad_value is not None:
            clipped = tuple([column[2] if column else 0.0 for column in measured])
            total = _together(clipped)
        if state.config.measures:
            moved, norms_after = zip(*[column[:2] or (0.0, 0.0) for column in measured], strict=True)
            updates, params, update_norm, param_norm = moved, norms_after, _together(moved), _together(norms_after)
    else:
        ones, skipped = (1.0,) * len(check.groups), effect is Effect.SKIPPED
        norms = norms._replace(coefficients=ones, coefficient=1.0, left=norms.total)
        clipped, total = ((0.0,) * len(check.groups), 0.0) if skipped else (norms.groups, norms.total)
    return StepResult(
        step=moment.step,
        epoch=moment.epoch,
        skipped=effect is Effect.SKIPPED,
        grad_norm=norms.total,
        non_finite_count=check.non_finite_count,
        groups=tuple(
            map(
                GroupResult,
                norms.groups,
                check.groups,
                state.tensor_steps.group_steps(),
                clipped,
                norms.coefficients,
                updates,
                params,
            )
        ),
        times=moment.times,
        accumulated=effect is Effect.ACCUMULATED,
        clipped_grad_norm=total,
        clip_coefficient=norms.coefficient,
        update_norm=update_norm,
        param_norm=param_norm,
        loss_scale=None if state.loss_scale is None else state.loss_scale.scale,
    )


def _together(norms: Sequence[float]) -> float:
    return norms[0] if len(norms) == 1 else math.hypot(*norms)
