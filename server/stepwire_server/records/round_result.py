"""The part of one worker's contribution in a step, in the domain's own terms."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Contributor", "RoundResult"]


class Contributor(NamedTuple):
    """One worker's gradient in a step.

    Attributes:
        worker: the index of the worker.
        weight: the weight of its gradient.
        grad_norm: the Euclidean norm of its gradient, unscaled.
        non_finite_count: the elements of its gradient that are NaN or Inf.
    """

    worker: int
    weight: float
    grad_norm: float
    non_finite_count: int


class RoundResult(NamedTuple):
    """The part of one contribution in the step that answers it.

    Attributes:
        contribution: the number of this worker's contribution.
        dropped: the gradient was not applied: its step had gone on without it, or it was too old.
        members: the workers that were present at the commit.
        contributors: the gradients that the step has, by worker.
        waiting_seconds: the time from the commit of this contribution to the step.
        staleness: the steps between the parameters that the gradient is of and its step; 0 for the next.
    """

    contribution: int
    dropped: bool = False
    members: int = 0
    contributors: tuple[Contributor, ...] = ()
    waiting_seconds: float = 0.0
    staleness: int = 0
