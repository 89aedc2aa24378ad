"""The check of a gradient that has arrived: its norms, and whether it can be applied. Nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from stepwire.errors import NonFiniteGradientError
from stepwire.optimizers import Hyperparameters
from stepwire.optimizers.norms import GradientNorms, gradient_norms, with_factors
from stepwire_server.engines.protocol import Pending
from stepwire_server.rules.exact_norm import exact_sum_of_squares
from stepwire_server.steps.step import Step, SteppedState
from stepwire_server.steps.update import effective_groups, gradient_factor

__all__ = ["GradientCheck", "check_gradient"]


class GradientCheck(NamedTuple):
    """The facts of a step that are known when its gradient has arrived.

    Attributes:
        groups: the hyper-parameters of each group, with scheduled learning rates.
        updates: the step updates, and does not only add to an accumulation.
        squared_norms: each group's sum of squares of the gradient that is applied, within `norms.RELATIVE_ERROR`.
        norms: the norms of the same, with the factors of clipping.
        finite: no element is NaN or Inf.
        non_finite_count: the elements that are.
    """

    groups: tuple[Hyperparameters, ...]
    updates: bool
    squared_norms: Sequence[float]
    norms: GradientNorms
    finite: bool
    non_finite_count: int


def check_gradient(step: Step, state: SteppedState) -> GradientCheck:
    """Check that the whole gradient has arrived, and measure it.

    Raises:
        InvalidRequestError: the chunks do not cover the step's segments, or a scheduled number is out of range.
        NonFiniteGradientError: under the policy `reject`.
    """
    gradient, config = step.gradient, state.config
    gradient.complete()
    updated = state.tensor_steps.group_steps() if config.scheduled else ()
    groups, every = effective_groups(config, step.request, updated), config.treatment.accumulation_steps
    updates, finite = step.request.step % every == 0, not gradient.non_finite_count
    squared = gradient.squared_norms()
    norms = _norms(step, state, squared, gradient.exact_squared_norm)
    if every > 1 and updates and finite:
        squared = _accumulated_squares(step, state, groups)
        norms = _norms(step, state, squared, lambda wanted: _exact_accumulated(step, state, groups, wanted))
        finite = math.isfinite(norms.total)
    if not finite and config.treatment.policy == "reject":
        raise _refusal(step, state)
    return GradientCheck(groups, updates, squared, norms, finite, gradient.non_finite_count)


def _norms(
    step: Step, state: SteppedState, squared: Sequence[float], exact: Callable[[Sequence[int]], Fraction]
) -> GradientNorms:
    """Return the norms of a gradient with the factors of clipping: the coordinator's, where it has decided.

    Args:
        step: the step.
        state: the session's state.
        squared: each group's sum of squares.
        exact: returns the exact sum of squares of some groups; slow and rarely needed.
    """
    treatment, decision = state.config.treatment, step.decision
    norms = gradient_norms(
        squared, exact, treatment.clip_grad_norm, state.config.group_clips, treatment.clip_formula or "torch"
    )
    return norms if decision is None else with_factors(norms, decision.coefficient, decision.groups)


def _accumulated_squares(step: Step, state: SteppedState, groups: Sequence[Hyperparameters]) -> list[float]:
    """Sum the squares of the gradient added to those before it: one more pass, which changes nothing."""
    gradient = step.gradient
    totals: list[list[Pending[float]]] = [[] for _ in groups]
    for start, end, group in gradient.selection.segments:
        factor = gradient_factor(groups[group], gradient.unscale)
        totals[group] += [
            state.arrays.sum_of_squares(found.chunk.gradient, found.begin, found.end, factor, found.start)
            for found in gradient.ranges(start, end)
        ]
    return [math.fsum(asked.wait() for asked in sums) for sums in totals]


def _exact_accumulated(
    step: Step, state: SteppedState, groups: Sequence[Hyperparameters], wanted: Sequence[int]
) -> Fraction:
    """Sum the squares of `_accumulated_squares` exactly, for some groups; slow and rarely needed."""
    gradient = step.gradient
    return exact_sum_of_squares(
        state.arrays.fetch(
            found.chunk.gradient, found.begin, found.end, gradient_factor(groups[group], gradient.unscale), found.start
        )
        for start, end, group in gradient.selection.segments
        if group in wanted
        for found in gradient.ranges(start, end)
    )


def _refusal(step: Step, state: SteppedState) -> NonFiniteGradientError:
    gradient, layout = step.gradient, state.config.layout
    if not gradient.non_finite_count:
        return NonFiniteGradientError(
            f"step {step.request.step}: the sum of the accumulated gradients is beyond float32; nothing was "
            "applied. Scale the gradients down, or load a grad_accumulation of zeros"
        )
    tensor = next(layout.overlapping(gradient.first_non_finite, gradient.first_non_finite + 1))
    return NonFiniteGradientError(
        f"step {step.request.step}: the gradient of tensor {tensor.spec.name!r} holds NaN or Inf "
        f"({gradient.non_finite_count} elements in all); nothing was applied. Mend the gradient, or create the "
        "session with the policy 'skip' or 'allow'",
        metadata={
            "tensor": tensor.spec.name,
            "element": gradient.first_non_finite - tensor.offset,
            "non_finite_count": gradient.non_finite_count,
        },
    )
