"""The check of a gradient that has arrived: its norms, and whether it can be applied. Nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Final, NamedTuple, Protocol

from stepwire.errors import NonFiniteGradientError
from stepwire.layout import Layout
from stepwire.optimizers import Hyperparameters
from stepwire.optimizers.norms import GradientNorms, gradient_norms, with_factors
from stepwire_server.steps.accumulated_sum import AccumulatedSum
from stepwire_server.steps.row_gradients import RowGradients
from stepwire_server.steps.step import Step, SteppedState
from stepwire_server.steps.update import effective_groups

__all__ = ["GradientCheck", "check_gradient", "refusal"]

# Half of the largest float32: the roundings of millions of additions do not double a sum.
_SAFE_SUM: Final = 2.0**127


class Measured(Protocol):
    """A gradient, or the sum of several, that has been squared."""

    @property
    def non_finite_count(self) -> int:
        """The elements that are NaN or Inf."""
        ...

    @property
    def first_non_finite(self) -> int:
        """The first flat element of those."""
        ...

    def squared_norms(self) -> list[float]:
        """Return the sum of squares of each group."""
        ...

    def exact_squared_norm(self, groups: Sequence[int]) -> Fraction:
        """Return the sum of squares of some groups exactly."""
        ...


class GradientCheck(NamedTuple):
    """The facts of a step that are known when its gradient has arrived.

    Attributes:
        groups: the hyper-parameters of each group, with scheduled learning rates.
        updates: the step updates, and does not only add to an accumulation.
        squared_norms: each group's sum of squares of the gradient that is applied or added, within
            `norms.RELATIVE_ERROR`. At the last step of an accumulation that gradient is the sum.
        norms: the norms of the same, with the factors of clipping.
        finite: no element of the same is NaN or Inf.
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
        ResourceExhaustedError: a table has no room for new ids.
    """
    gradient, config = step.gradient, state.config
    gradient.complete()
    updated = state.tensor_steps.group_steps() if config.scheduled else ()
    groups, treatment = effective_groups(config, step.request, updated), config.treatment
    every, rejects = treatment.accumulation_steps, treatment.policy == "reject"
    updates = step.request.step % every == 0
    if rejects and gradient.non_finite_count:
        raise refusal(step, config.layout, gradient)
    applied: Measured = gradient
    squared = gradient.squared_norms()
    norms = _norms(step, state, gradient, squared)
    if every > 1 and (updates or (rejects and state.sum_bound + norms.total > _SAFE_SUM)):
        total = AccumulatedSum(gradient, state.arrays, groups)
        if rejects and total.non_finite_count:
            raise refusal(step, config.layout, total)
        if updates:
            applied, squared = total, total.squared_norms()
            norms = _norms(step, state, total, squared)
    count = applied.non_finite_count
    is_skipped = (count and treatment.policy != "allow") or (step.decision is not None and step.decision.skip)
    if updates and gradient.rows is not None and not is_skipped:
        _check_room(gradient.rows, state)
    return GradientCheck(groups, updates, squared, norms, not count, count)


def _check_room(rows: RowGradients, state: SteppedState) -> None:
    """Refuse new ids that a table has no room for."""
    for table in rows.tables() if state.row_ids else ():
        if (ids := state.row_ids.get(table.tensor)) is not None:
            ids.check(table.rows, state.tensor_steps.tensor_steps()[table.tensor] + 1)


def _norms(step: Step, state: SteppedState, measured: Measured, squared: Sequence[float]) -> GradientNorms:
    """Return the norms of a gradient with the factors of clipping: the coordinator's, where it has decided."""
    treatment, decision = state.config.treatment, step.decision
    norms = gradient_norms(
        squared,
        measured.exact_squared_norm,
        treatment.clip_grad_norm,
        state.config.group_clips,
        treatment.clip_formula or "torch",
    )
    return norms if decision is None else with_factors(norms, decision.coefficient, decision.groups)


def refusal(step: Step, layout: Layout, found: Measured) -> NonFiniteGradientError:
    """Return the error of a gradient, or of a sum, that is not finite."""
    tensor = next(layout.overlapping(found.first_non_finite, found.first_non_finite + 1))
    what = f"the gradient of tensor {tensor.spec.name!r} holds NaN or Inf"
    remedy = "Mend the gradient, or create the session with the policy 'skip' or 'allow'"
    if found is not step.gradient:
        what = f"the sum of the accumulated gradients of tensor {tensor.spec.name!r} is beyond float32"
        remedy = "Scale the gradients down, or load a grad_accumulation of zeros"
    return NonFiniteGradientError(
        f"step {step.request.step}: {what} ({found.non_finite_count} elements in all); nothing was applied. {remedy}",
        metadata={
            "tensor": tensor.spec.name,
            "element": found.first_non_finite - tensor.offset,
            "non_finite_count": found.non_finite_count,
        },
    )
