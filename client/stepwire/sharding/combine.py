"""One result from those of the shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from stepwire.optimizers.norms import rounded_norm
from stepwire.sharding.coordinator import Decision
from stepwire.v1 import step_pb2

__all__ = ["combined"]

_LARGEST = ("receive_seconds", "queue_seconds", "apply_seconds")


def combined(
    results: Sequence[step_pb2.StepResult], decision: Decision | None, *, limited: bool
) -> step_pb2.StepResult:
    """Say of the whole what one session would have said.

    Args:
        results: of the shards, in order.
        decision: what was decided of the step; without one, the gradient's norms are within a float32 ulp of the whole's.
        limited: elements are clipped by value, so the shards know the norms after clipping.
    """
    if len(results) == 1:
        return results[0]
    telemetry = step_pb2.Telemetry(
        grad_norm=_norm(result.telemetry.grad_norm for result in results),
        clipped_grad_norm=_root(result.telemetry.clipped_grad_norm for result in results),
        clip_coefficient=results[0].telemetry.clip_coefficient,
        non_finite_count=sum(result.telemetry.non_finite_count for result in results),
        groups=[_group(groups) for groups in zip(*(result.telemetry.groups for result in results), strict=True)],
        **{name: max(getattr(result.telemetry, name) for result in results) for name in _LARGEST},
    )
    if results[0].telemetry.HasField("loss_scale"):
        telemetry.loss_scale = results[0].telemetry.loss_scale
    if sent := [r.telemetry for r in results if r.telemetry.HasField("previous_send_seconds")]:
        telemetry.previous_send_seconds = max(each.previous_send_seconds for each in sent)
    _measure(telemetry, [result.telemetry for result in results])
    whole = step_pb2.StepResult(
        step=results[0].step,
        durable_step=min(result.durable_step for result in results),
        epoch=max(result.epoch for result in results),
        replayed=all(result.replayed for result in results),
        skipped=results[0].skipped,
        accumulated=results[0].accumulated,
        telemetry=telemetry,
    )
    if decision is not None:
        _decide(whole, decision)
    if not (whole.skipped or limited and not whole.accumulated):
        _clip(whole, decision)
    return whole


def _group(parts: Sequence[step_pb2.GroupTelemetry]) -> step_pb2.GroupTelemetry:
    """Combine one group; its numbers are told by a shard that moved it, if there is one."""
    mover = max(parts, key=lambda part: part.t)
    group = step_pb2.GroupTelemetry(
        grad_norm=_norm(part.grad_norm for part in parts),
        hyperparameters=mover.hyperparameters,
        t=mover.t,
        clipped_grad_norm=_root(part.clipped_grad_norm for part in parts),
        clip_coefficient=mover.clip_coefficient,
    )
    _measure(group, parts)
    return group


def _measure(whole: Any, parts: Sequence[Any]) -> None:
    for name in ("update_norm", "param_norm"):
        if all(part.HasField(name) for part in parts):
            setattr(whole, name, _root(getattr(part, name) for part in parts))


def _decide(whole: step_pb2.StepResult, decision: Decision) -> None:
    """Put the norms of the whole gradient, as they were decided on, in the place of what the parts add up to."""
    whole.telemetry.grad_norm = decision.norms.total
    for norm, group in zip(decision.norms.groups, whole.telemetry.groups, strict=True):
        group.grad_norm = norm


def _clip(whole: step_pb2.StepResult, decision: Decision | None) -> None:
    """Say what clipping by norm left, where nothing else took anything away."""
    telemetry = whole.telemetry
    if decision is None or whole.accumulated:
        clipped, total = [group.grad_norm for group in telemetry.groups], telemetry.grad_norm
    else:
        clipped, total = list(decision.norms.clipped()), decision.norms.left * decision.norms.coefficient
    telemetry.clipped_grad_norm = total
    for norm, group in zip(clipped, telemetry.groups, strict=True):
        group.clipped_grad_norm = norm


def _norm(parts: Iterable[float]) -> float:
    """Return the norm of what has parts of such norms, in 24 bits as every norm of a gradient."""
    squared = [part * part for part in parts]
    total = math.fsum(squared)
    return rounded_norm(total, lambda: sum(map(Fraction, squared), Fraction(0)))


def _root(parts: Iterable[float]) -> float:
    return math.sqrt(math.fsum(part * part for part in parts))
