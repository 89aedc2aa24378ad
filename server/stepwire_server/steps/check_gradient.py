"""What the gradient that came says of its step: its norms, and whether it can be applied. Nothing is changed."""

from __future__ import annotations

import math
from typing import NamedTuple

from stepwire.errors import NonFiniteGradientError
from stepwire.optimizers import Hyperparameters
from stepwire.optimizers.norms import GradientNorms, gradient_norms, with_factors
from stepwire_server.engines.protocol import EngineState
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.steps.gradient import GradientStaging
from stepwire_server.steps.squares import Squares, accumulated_squares, arrived_squares
from stepwire_server.steps.tensor_steps import TensorSteps
from stepwire_server.steps.update import effective_groups

__all__ = ["GradientCheck", "check_gradient"]


class GradientCheck(NamedTuple):
    """What is known of a step when its gradient has arrived.

    Attributes:
        groups: the numbers of each group, with scheduled learning rates.
        last: the step updates, and does not only add to an accumulation.
        squares: sums of squares of what is applied.
        norms: of the same, with the factors of clipping.
        finite: no element is NaN or Inf.
    """

    groups: tuple[Hyperparameters, ...]
    last: bool
    squares: Squares
    norms: GradientNorms
    finite: bool


def check_gradient(
    config: SessionConfig, request: StepRequest, staging: GradientStaging, state: EngineState, progress: TensorSteps
) -> GradientCheck:
    """Check that everything came, and measure it.

    Raises:
        InvalidRequestError: the chunks do not cover what they must, or a scheduled number is out of range.
        NonFiniteGradientError: under the policy `reject`.
    """
    staging.complete()
    updates = progress.group_steps() if config.scheduled else ()
    groups, every = effective_groups(config, request, updates), config.treatment.accumulation_steps
    squares, last, finite = arrived_squares(staging), request.step % every == 0, not staging.non_finite_count
    norms = _norms(config, request, squares)
    if every > 1 and last and finite:
        squares = accumulated_squares(staging, state, groups)
        norms = _norms(config, request, squares)
        finite = math.isfinite(norms.total)
    if not finite and config.treatment.policy == "reject":
        raise _refusal(config, request, staging)
    return GradientCheck(groups, last, squares, norms, finite)


def _norms(config: SessionConfig, request: StepRequest, squares: Squares) -> GradientNorms:
    treatment, decision = config.treatment, request.decision
    norms = gradient_norms(
        squares.groups, squares.exact, treatment.clip_grad_norm, config.group_clips, treatment.clip_formula or "torch"
    )
    return norms if decision is None else with_factors(norms, decision.coefficient, decision.groups)


def _refusal(config: SessionConfig, request: StepRequest, staging: GradientStaging) -> NonFiniteGradientError:
    layout = config.layout
    if not staging.non_finite_count:
        return NonFiniteGradientError(
            f"step {request.step}: the sum of the accumulated gradients is beyond float32; nothing was "
            "applied. Scale the gradients down, or load a grad_accumulation of zeros"
        )
    tensor = next(layout.overlapping(staging.first_non_finite, staging.first_non_finite + 1))
    return NonFiniteGradientError(
        f"step {request.step}: the gradient of tensor {tensor.spec.name!r} holds NaN or Inf "
        f"({staging.non_finite_count} elements in all); nothing was applied. Mend the gradient, or create the "
        "session with the policy 'skip' or 'allow'",
        metadata={
            "tensor": tensor.spec.name,
            "element": staging.first_non_finite - tensor.offset,
            "non_finite_count": staging.non_finite_count,
        },
    )
