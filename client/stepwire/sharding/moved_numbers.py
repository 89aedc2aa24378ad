"""The numbers of new shards, from those of the former ones: every tensor keeps its t wherever its ranges are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from stepwire.errors import StepMismatchError
from stepwire.sharding.combine import combined
from stepwire.sharding.coordinator import Decision
from stepwire.sharding.partition import Partition
from stepwire.v1 import move_pb2, step_pb2

__all__ = ["moved_numbers"]

_T = TypeVar("_T", int, float)


def moved_numbers(
    former: Partition, numbers: Sequence[move_pb2.StateNumbers], new: Partition
) -> list[move_pb2.StateNumbers]:
    """Return the numbers of each new shard.

    The first new shard has the result of the last step of the whole, and the others have one of the same step with
    norms of 0. So the results of a replay combine to the norms that there were. Of several workers, each result is so.

    Args:
        former: the partition that the model has.
        numbers: those of its shards, in order.
        new: the partition that the model gets.

    Raises:
        StepMismatchError: the shards are not at one moment.
    """
    fields: dict[str, Callable[[move_pb2.StateNumbers], object]] = {
        "step": lambda each: each.step,
        "load": lambda each: each.load,
        "loss_scale": lambda each: each.loss_scale,
        "contributions": lambda each: {worker.worker: worker.contribution for worker in each.workers},
    }
    for field, read in fields.items():
        values = [read(each) for each in numbers]
        if any(value != values[0] for value in values):
            raise StepMismatchError(
                f"the shards differ in their {field}: {values}; load one state into all of them, and move them then"
            )
    steps = _by_tensor(former, [each.tensor_steps for each in numbers], "t")
    keeps = any(each.tensor_scalars for each in numbers)
    scalars = _by_tensor(former, [each.tensor_scalars for each in numbers], "scalar") if keeps else {}
    results, workers = _results(numbers, len(new.shards)), _workers(numbers, len(new.shards))
    moved = []
    for shard, result, of_workers in zip(new.shards, results, workers, strict=True):
        own = move_pb2.StateNumbers(
            step=numbers[0].step,
            load=numbers[0].load,
            tensor_steps=[steps[each.tensor] for each in shard.ranges],
            tensor_scalars=[scalars[each.tensor] for each in shard.ranges] if scalars else [],
            sum_bound=max(each.sum_bound for each in numbers),
            loss_scale=numbers[0].loss_scale if numbers[0].HasField("loss_scale") else None,
            last_result=result,
            workers=of_workers,
        )
        moved.append(own)
    return moved


def _by_tensor(former: Partition, values: Sequence[Sequence[_T]], what: str) -> dict[int, _T]:
    """Return the number of each tensor, which all its ranges have.

    Raises:
        StepMismatchError: they have not.
    """
    found: dict[int, _T] = {}
    for shard, own in zip(former.shards, values, strict=True):
        for each, value in zip(shard.ranges, own, strict=True):
            if found.setdefault(each.tensor, value) != value:
                name = former.layout.tensors[each.tensor].spec.name
                raise StepMismatchError(
                    f"the ranges of tensor {name!r} have the {what} {found[each.tensor]} and {value}; load one state "
                    "into all shards, and move them then"
                )
    return found


def _workers(numbers: Sequence[move_pb2.StateNumbers], count: int) -> list[list[move_pb2.WorkerNumbers]]:
    """Return the numbers of the workers for each new shard."""
    moved: list[list[move_pb2.WorkerNumbers]] = [[] for _ in range(count)]
    for parts in zip(*(each.workers for each in numbers), strict=True):
        for own, result in zip(moved, _results(parts, count), strict=True):
            follows = any(part.present for part in parts)  # its stream to another shard may be new just now
            own.append(
                move_pb2.WorkerNumbers(
                    worker=parts[0].worker,
                    contribution=parts[0].contribution,
                    last_result=result,
                    present=follows,
                    clock=max(part.clock for part in parts),
                    loaded=min(part.loaded for part in parts),
                )
            )
    return moved


def _results(
    numbers: Sequence[move_pb2.StateNumbers | move_pb2.WorkerNumbers], count: int
) -> list[step_pb2.StepResult | None]:
    """Return the last result for each new shard; None for a state whose last step a load has set, or without a step."""
    if not all(each.HasField("last_result") for each in numbers):
        return [None] * count
    decided = Decision(None, step_pb2.StepCommit())  # the norms after clipping are those of the shards
    whole = combined([each.last_result for each in numbers], decided, limited=False)
    return [whole, *(_without_norms(whole) for _ in range(1, count))]


def _without_norms(whole: step_pb2.StepResult) -> step_pb2.StepResult:
    """Return a result with nothing that combining adds up."""
    other = step_pb2.StepResult()
    other.CopyFrom(whole)
    other.telemetry.non_finite_count = 0
    for contributor in other.round.contributors:
        contributor.grad_norm, contributor.non_finite_count = 0.0, 0
    measured: list[step_pb2.Telemetry | step_pb2.GroupTelemetry] = [other.telemetry, *other.telemetry.groups]
    for each in measured:
        each.grad_norm = each.clipped_grad_norm = 0.0
        for field in ("update_norm", "param_norm"):
            if each.HasField(field):
                setattr(each, field, 0.0)
    return other
