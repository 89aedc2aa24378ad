"""One result, one header and one info from those of the shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from stepwire.optimizers.norms import GradientNorms, rounded_norm
from stepwire.results import SessionInfo, SessionStatistics, TableUse, TransportChoice
from stepwire.sharding.coordinator import Decision
from stepwire.sharding.partition import Partition
from stepwire.transports.available import TRANSPORTS
from stepwire.v1 import aggregation_pb2, state_pb2, step_pb2

__all__ = ["combined", "combined_header", "combined_info", "combined_statistics", "least_transport"]

_LARGEST = ("receive_seconds", "queue_seconds", "apply_seconds")


def combined(
    results: Sequence[step_pb2.StepResult], decision: Decision | None, *, limited: bool
) -> step_pb2.StepResult:
    """Return the result that one session would have for the whole.

    Args:
        results: the results of the shards, in order.
        decision: the decision about the step; without one, or with another worker's, the gradient's norms are within
            a float32 ulp of the whole's.
        limited: elements are clipped by value, so the shards know the norms after clipping.

    Of several workers, a contribution that some shards alone have dropped has the measurements of the others.
    """
    if len(results) == 1:
        return results[0]
    applied = [result for result in results if not result.round.dropped] or results
    measured = [result.telemetry for result in applied]
    telemetry = step_pb2.Telemetry(
        grad_norm=_norm(each.grad_norm for each in measured),
        clipped_grad_norm=_root(each.clipped_grad_norm for each in measured),
        clip_coefficient=measured[0].clip_coefficient,
        non_finite_count=sum(each.non_finite_count for each in measured),
        groups=[_group(groups) for groups in zip(*(each.groups for each in measured), strict=True)],
        **{name: max(getattr(result.telemetry, name) for result in results) for name in _LARGEST},
    )
    if measured[0].HasField("loss_scale"):
        telemetry.loss_scale = measured[0].loss_scale
    if sent := [r.telemetry for r in results if r.telemetry.HasField("previous_send_seconds")]:
        telemetry.previous_send_seconds = max(each.previous_send_seconds for each in sent)
    _measure(telemetry, measured)
    whole = step_pb2.StepResult(
        step=results[0].step,
        durable_step=min(result.durable_step for result in results),
        epoch=max(result.epoch for result in results),
        replayed=all(result.replayed for result in results),
        skipped=applied[0].skipped,
        accumulated=applied[0].accumulated,
        telemetry=telemetry,
    )
    if results[0].HasField("round"):
        whole.round.CopyFrom(_round([result.round for result in results]))
    norms = None if decision is None else decision.norms
    if norms is not None:
        _decide(whole, norms)
    followed = decision is not None and norms is None  # then the shards' own norms after clipping remain
    if not (whole.skipped or followed or limited and not whole.accumulated):
        _clip(whole, norms)
    return whole


def _round(parts: Sequence[aggregation_pb2.RoundResult]) -> aggregation_pb2.RoundResult:
    """Combine the parts of one worker; of a contributor, the norms of its gradients in the shards that have it."""
    whole = aggregation_pb2.RoundResult(
        contribution=parts[0].contribution,
        dropped=any(part.dropped for part in parts),
        members=min(part.members for part in parts),
        waiting_seconds=max(part.waiting_seconds for part in parts),
        staleness=max(part.staleness for part in parts),
    )
    found: dict[int, list[aggregation_pb2.Contributor]] = {}
    for part in parts:
        for each in part.contributors:
            found.setdefault(each.worker, []).append(each)
    for worker, ranges in sorted(found.items()):
        norm, count = _norm(each.grad_norm for each in ranges), sum(each.non_finite_count for each in ranges)
        whole.contributors.add(worker=worker, weight=ranges[0].weight, grad_norm=norm, non_finite_count=count)
    return whole


def least_transport(choices: Sequence[TransportChoice | None]) -> TransportChoice | None:
    """Return the least of the shards' transports; None unless all are known."""
    known = [choice for choice in choices if choice is not None]
    return max(known, key=lambda choice: TRANSPORTS.index(choice.name)) if len(known) == len(choices) else None


def combined_header(headers: Sequence[state_pb2.PullHeader], partition: Partition) -> state_pb2.PullHeader:
    """Return the header of a pull of the whole, from headers of one step."""
    whole = state_pb2.PullHeader(
        step=headers[0].step,
        epoch=max(header.epoch for header in headers),
        load=max(header.load for header in headers),
        tensor_steps=[0] * len(partition.layout.tensors),
        tensor_scalars=[0.0] * len(partition.layout.tensors) if any(h.tensor_scalars for h in headers) else [],
        loss_scale=headers[0].loss_scale if headers[0].HasField("loss_scale") else None,
    )
    for shard, header in zip(partition.shards, headers, strict=True):
        for each, step in zip(shard.ranges, header.tensor_steps, strict=True):
            whole.tensor_steps[each.tensor] = step
        for each, scalar in zip(shard.ranges if header.tensor_scalars else (), header.tensor_scalars, strict=True):
            whole.tensor_scalars[each.tensor] = scalar
    return whole


def combined_info(session_id: str, infos: Sequence[SessionInfo]) -> SessionInfo:
    """Return the info of the whole: bytes added up, and of numbers, flags and times the least."""
    return SessionInfo(
        session_id=session_id,
        label=infos[0].label,
        epoch=max(info.epoch for info in infos),
        applied_step=min(info.applied_step for info in infos),
        durable_step=min(info.durable_step for info in infos),
        memory_bytes=sum(info.memory_bytes for info in infos),
        device=",".join(info.device for info in infos),
        ready=all(info.ready for info in infos),
        attached=all(info.attached for info in infos),
        create_time=min(info.create_time for info in infos),
        expire_time=min(info.expire_time for info in infos),
        idle_seconds=min(info.idle_seconds for info in infos),
        members=infos[0].members,
        tables=tuple(_tables(infos)),
    )


def _tables(infos: Sequence[SessionInfo]) -> Iterable[TableUse]:
    """Add the rows of each table up."""
    found: dict[str, list[TableUse]] = {}
    for info in infos:
        for table in info.tables:
            found.setdefault(table.name, []).append(table)
    for name, parts in found.items():
        yield TableUse(name, sum(part.rows for part in parts), sum(part.evicted_rows for part in parts))


def combined_statistics(
    shards: Sequence[SessionStatistics], step_in_doubt: int | None, *, reply_begun: bool
) -> SessionStatistics:
    """Return the statistics of the whole: streams added up, and of the other numbers the least."""
    return SessionStatistics(
        applied_step=min(shard.applied_step for shard in shards),
        durable_step=min(shard.durable_step for shard in shards),
        attached=all(shard.attached for shard in shards),
        streams_opened=sum(shard.streams_opened for shard in shards),
        step_in_doubt=step_in_doubt,
        reply_begun=reply_begun,
        applied_load=min(shard.applied_load for shard in shards),
    )


def _group(groups: Sequence[step_pb2.GroupTelemetry]) -> step_pb2.GroupTelemetry:
    """Combine one group; its hyper-parameters come from a shard that updated it, if there is one."""
    mover = max(groups, key=lambda group: group.t)
    whole = step_pb2.GroupTelemetry(
        grad_norm=_norm(group.grad_norm for group in groups),
        hyperparameters=mover.hyperparameters,
        t=mover.t,
        clipped_grad_norm=_root(group.clipped_grad_norm for group in groups),
        clip_coefficient=mover.clip_coefficient,
    )
    _measure(whole, groups)
    return whole


def _measure(whole: Any, shards: Sequence[Any]) -> None:
    for name in ("update_norm", "param_norm"):
        if all(shard.HasField(name) for shard in shards):
            setattr(whole, name, _root(getattr(shard, name) for shard in shards))


def _decide(whole: step_pb2.StepResult, norms: GradientNorms) -> None:
    """Put the norms of the whole gradient, as the decision has them, in the place of the shards' sums."""
    whole.telemetry.grad_norm = norms.total
    for norm, group in zip(norms.groups, whole.telemetry.groups, strict=True):
        group.grad_norm = norm


def _clip(whole: step_pb2.StepResult, norms: GradientNorms | None) -> None:
    """Set the norms after clipping by norm, in a step without any other clipping."""
    telemetry = whole.telemetry
    if norms is None or whole.accumulated:
        clipped, total = [group.grad_norm for group in telemetry.groups], telemetry.grad_norm
    else:
        clipped, total = list(norms.clipped()), norms.left * norms.coefficient
    telemetry.clipped_grad_norm = total
    for norm, group in zip(clipped, telemetry.groups, strict=True):
        group.clipped_grad_norm = norm


def _norm(norms: Iterable[float]) -> float:
    """Return the norm of a vector from the norms of its ranges, in 24 bits as every norm of a gradient."""
    squared = [norm * norm for norm in norms]
    total = math.fsum(squared)
    return rounded_norm(total, lambda: sum(map(Fraction, squared), Fraction(0)))


def _root(norms: Iterable[float]) -> float:
    return math.sqrt(math.fsum(norm * norm for norm in norms))
