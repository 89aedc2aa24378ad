"""Records of the workers of a session, and of their parts in a step."""

from __future__ import annotations

import dataclasses

from stepwire.v1 import aggregation_pb2

__all__ = ["Contributor", "Member", "RoundResult"]


@dataclasses.dataclass(frozen=True, slots=True)
class Contributor:
    """One worker's gradient in a step.

    Attributes:
        worker: the index of the worker.
        weight: the weight of its gradient.
        grad_norm: the Euclidean norm of its gradient, unscaled.
        non_finite_count: the elements of its gradient that were NaN or Inf.
    """

    worker: int
    weight: float
    grad_norm: float
    non_finite_count: int


@dataclasses.dataclass(frozen=True, slots=True)
class RoundResult:
    """The part of one worker's gradient in the step that answers it.

    Attributes:
        contribution: the number of the gradient, in a series of the worker's own.
        dropped: True if the gradient was not applied: the step had gone on without it, or it was too old. The
            parameters of the reply are the present ones.
        members: the number of workers that were present.
        contributors: the gradients that the step has, by worker.
        waiting_seconds: the time of waiting for the other workers.
        staleness: the steps between the parameters that the gradient is of and its step; 0 for the next.
    """

    contribution: int
    dropped: bool
    members: int
    contributors: tuple[Contributor, ...]
    waiting_seconds: float
    staleness: int

    @classmethod
    def from_wire(cls, message: aggregation_pb2.RoundResult) -> RoundResult:
        """Decode the part of a worker."""
        contributors = tuple(
            Contributor(each.worker, each.weight, each.grad_norm, each.non_finite_count)
            for each in message.contributors
        )
        return cls(
            message.contribution,
            message.dropped,
            message.members,
            contributors,
            message.waiting_seconds,
            message.staleness,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A worker of a session.

    Attributes:
        worker: the index of the worker.
        attached: True while a stream is attached as this worker.
        contribution: the number of its last gradient that was answered.
    """

    worker: int
    attached: bool
    contribution: int

    @classmethod
    def from_wire(cls, message: aggregation_pb2.Member) -> Member:
        """Decode a worker."""
        return cls(message.worker, message.attached, message.contribution)
