"""Records of one step: its effect, its groups, and each worker's part in it."""

from __future__ import annotations

import dataclasses
from typing import Any

from stepwire.optimizers import Hyperparameters
from stepwire.v1 import aggregation_pb2, step_pb2
from stepwire.wire.messages import hyperparameters_from_wire

__all__ = ["Contributor", "GroupResult", "PastStep", "RoundResult", "StepResult"]


@dataclasses.dataclass(frozen=True, slots=True)
class GroupResult:
    """One parameter group in one step.

    Attributes:
        grad_norm: the Euclidean norm of the group's gradient before clipping.
        hyperparameters: the values of this step; a scheduled learning rate is in its place.
        t: the updates that the group has had, this one included.
        clipped_grad_norm: the norm after clipping.
        clip_coefficient: the factor of clipping by norm, the group's own and the global one together.
        update_norm: the norm of the parameters' change; None without a measurement, or without an update.
        param_norm: the norm of the parameters after the step; None likewise.
    """

    grad_norm: float
    hyperparameters: Hyperparameters
    t: int
    clipped_grad_norm: float = 0.0
    clip_coefficient: float = 1.0
    update_norm: float | None = None
    param_norm: float | None = None


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
class StepResult:
    """The effect of one step.

    Attributes:
        step: the number of the step.
        durable_step: the last step that survives a loss of the server; 0 if none does.
        epoch: the epoch of the session that applied the step.
        replayed: True if the step had been applied before, and its reply was lost.
        skipped: True if nothing was updated, because the gradient, or the sum of accumulated ones, was not finite.
        grad_norm: the Euclidean norm of the whole gradient, unscaled, before clipping. At the end of an accumulation it
            is that of the sum.
        non_finite_count: the elements of the same gradient that were NaN or Inf.
        groups: one entry a group.
        receive_seconds: the time from the step's first message to its commit, on the server.
        queue_seconds: the time of waiting for the session and the engine.
        apply_seconds: the time of decoding, of the rule and of encoding.
        previous_send_seconds: the time of sending the reply before; None on the first step of a stream.
        accumulated: True if the gradient was added to those before it, NaN and Inf included, and nothing was updated.
        clipped_grad_norm: the norm after clipping.
        clip_coefficient: the factor of clipping by the global norm.
        update_norm: the norm of the parameters' change, to about six digits; 0 only if no parameter changed. None
            without a measurement, or without an update.
        param_norm: the norm of the parameters after the step, to about six digits; None likewise.
        loss_scale: the factor for the next loss; None without loss scaling.
        round: the part of this worker among several; None for a session with one.
    """

    step: int
    durable_step: int
    epoch: int
    replayed: bool
    skipped: bool
    grad_norm: float
    non_finite_count: int
    groups: tuple[GroupResult, ...]
    receive_seconds: float
    queue_seconds: float
    apply_seconds: float
    previous_send_seconds: float | None = None
    accumulated: bool = False
    clipped_grad_norm: float = 0.0
    clip_coefficient: float = 1.0
    update_norm: float | None = None
    param_norm: float | None = None
    loss_scale: float | None = None
    round: RoundResult | None = None

    @classmethod
    def from_wire(cls, message: step_pb2.StepResult) -> StepResult:
        """Decode a result."""
        telemetry = message.telemetry
        return cls(
            step=message.step,
            durable_step=message.durable_step,
            epoch=message.epoch,
            replayed=message.replayed,
            skipped=message.skipped,
            grad_norm=telemetry.grad_norm,
            non_finite_count=telemetry.non_finite_count,
            groups=tuple(_group(group) for group in telemetry.groups),
            receive_seconds=telemetry.receive_seconds,
            queue_seconds=telemetry.queue_seconds,
            apply_seconds=telemetry.apply_seconds,
            previous_send_seconds=_optional(telemetry, "previous_send_seconds"),
            accumulated=message.accumulated,
            clipped_grad_norm=telemetry.clipped_grad_norm,
            clip_coefficient=telemetry.clip_coefficient,
            update_norm=_optional(telemetry, "update_norm"),
            param_norm=_optional(telemetry, "param_norm"),
            loss_scale=_optional(telemetry, "loss_scale"),
            round=RoundResult.from_wire(message.round) if message.HasField("round") else None,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class PastStep:
    """A step that a session remembers; see `Session.history`.

    Attributes:
        result: its effect: norms, learning rates, times on the server.
        end_time: the moment of its end, in seconds since 1970 by the client's clock.
        seconds: the time until its reply was read, repetitions included.
    """

    result: StepResult
    end_time: float
    seconds: float

    @property
    def step(self) -> int:
        """The number of the step."""
        return self.result.step

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The learning rate of each group."""
        return tuple(group.hyperparameters.lr for group in self.result.groups)


def _group(message: step_pb2.GroupTelemetry) -> GroupResult:
    return GroupResult(
        message.grad_norm,
        hyperparameters_from_wire(message.hyperparameters),
        message.t,
        message.clipped_grad_norm,
        message.clip_coefficient,
        _optional(message, "update_norm"),
        _optional(message, "param_norm"),
    )


def _optional(message: Any, name: str) -> float | None:
    value: float = getattr(message, name)
    return value if message.HasField(name) else None
