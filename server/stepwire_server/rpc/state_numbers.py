"""The numbers of a state that moves, between the contract's messages and the domain's records."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping

import msgspec

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.gradient_treatment import check_scale
from stepwire.v1 import aggregation_pb2, move_pb2, step_pb2
from stepwire.wire.messages import hyperparameters_from_wire
from stepwire_server.durability.manifest import MemberFacts
from stepwire_server.records.round_result import Contributor, RoundResult
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.records.step_result import GroupResult, StepResult, StepTimes
from stepwire_server.rpc.encode import encode_result
from stepwire_server.rules.loss_scale import LossScale
from stepwire_server.sessions.exchange import Captured
from stepwire_server.sessions.imported_state import ImportedNumbers
from stepwire_server.sessions.workers import FIRST_GENERATION

__all__ = ["decode_contributions", "decode_numbers", "decode_result", "encode_contributions", "encode_numbers"]

_COUNTER_END = 2**53


def encode_numbers(captured: Captured) -> move_pb2.StateNumbers:
    """Encode the numbers of a moment."""
    numbers = captured.numbers
    message = move_pb2.StateNumbers(
        step=numbers.step,
        load=numbers.load,
        tensor_steps=numbers.tensor_steps,
        tensor_scalars=numbers.tensor_scalars,
        sum_bound=captured.sum_bound,
    )
    if numbers.loss_scale is not None:
        message.loss_scale.scale, message.loss_scale.clean_steps = numbers.loss_scale
    if captured.last_result is not None:
        encode_result(captured.last_result, 0, message.last_result)
    for each in captured.members:
        if each.acquired:  # else it has never joined
            worker = message.workers.add(
                worker=each.worker,
                contribution=each.contribution,
                present=each.worker in captured.present,
                clock=captured.clocks.get(each.worker, 0),
                loaded=each.loaded,
            )
            if each.last_result is not None:
                encode_result(msgspec.msgpack.decode(each.last_result, type=StepResult), 0, worker.last_result)
    return message


def encode_contributions(numbers: Mapping[int, int], anew: Collection[int] = ()) -> list[move_pb2.WorkerNumber]:
    """Encode the numbers of several workers, of whom some begin anew behind a load."""
    return [
        move_pb2.WorkerNumber(worker=index, contribution=number, begins_anew=index in anew)
        for index, number in numbers.items()
    ]


def decode_contributions(message: Iterable[move_pb2.WorkerNumber]) -> dict[int, int]:
    """Decode the numbers of several workers."""
    return {each.worker: each.contribution for each in message}


def decode_numbers(message: move_pb2.StateNumbers, config: SessionConfig) -> ImportedNumbers:
    """Validate the numbers of a moment.

    Raises:
        InvalidRequestError: a field is wrong; the message names it.
    """
    tensors, scalars = len(config.layout.tensors), tuple(message.tensor_scalars)
    if len(message.tensor_steps) != tensors:
        raise _wrong("tensor_steps", f"{len(message.tensor_steps)} entries; it must be {tensors}")
    if len(scalars) != (0 if config.rule.tensor_scalar is None else tensors):
        raise _wrong("tensor_scalars", f"{len(scalars)} entries, and the rule is {config.rule.name}")
    if wrong := [scalar for scalar in scalars if not 0.0 <= scalar <= 1.0]:
        raise _wrong("tensor_scalars", f"{wrong[0]!r} is not in [0, 1]")
    if late := [count for count in (message.step, message.load, *message.tensor_steps) if count >= _COUNTER_END]:
        raise _wrong("step", f"{late[0]} is not below 2^53")
    if math.isnan(message.sum_bound) or message.sum_bound < 0:
        raise _wrong("sum_bound", f"{message.sum_bound!r} is not >= 0")
    if message.HasField("loss_scale") != (config.treatment.loss_scaling is not None):
        raise _wrong("loss_scale", "it is set exactly if the session scales losses")
    loss_scale = None
    if message.HasField("loss_scale"):
        check_scale(message.loss_scale.scale, "numbers.loss_scale.scale")
        loss_scale = LossScale(message.loss_scale.scale, message.loss_scale.clean_steps)
    result = decode_result(message.last_result) if message.HasField("last_result") else None
    if result is not None and (result.step != message.step or len(result.groups) != len(config.groups)):
        raise _wrong("last_result", f"it is of step {result.step} and {len(result.groups)} groups")
    snapshot = Snapshot(message.step, message.load, tuple(message.tensor_steps), loss_scale, scalars)
    workers = tuple(_decode_workers(message, config))
    present = frozenset(each.worker for each in message.workers if each.present)
    clocks = {each.worker: each.clock for each in message.workers}
    return ImportedNumbers(snapshot, message.sum_bound, result, workers, present, clocks)


def _decode_workers(message: move_pb2.StateNumbers, config: SessionConfig) -> Iterator[MemberFacts]:
    """Validate the numbers of several workers, and yield each with its first hold.

    Raises:
        InvalidRequestError: a field is wrong; the message names it.
    """
    most = 0 if config.aggregation is None else config.aggregation.workers
    former = -1
    for place, each in enumerate(message.workers):
        field, result = f"workers[{place}]", None
        if not former < each.worker < most:
            raise _wrong(
                f"{field}.worker", f"{each.worker} is not in ({former}, {most}): name each worker once, by index"
            )
        for counter in ("contribution", "clock", "loaded"):
            if (value := getattr(each, counter)) >= _COUNTER_END:
                raise _wrong(f"{field}.{counter}", f"{value} is not below 2^53")
        if each.HasField("last_result"):
            result = decode_result(each.last_result)
            part = result.round
            groups = {len(config.groups)} | ({0} if part is not None and part.dropped else set())
            if part is None or not 0 < part.contribution == each.contribution or len(result.groups) not in groups:
                raise _wrong(f"{field}.last_result", f"it is no result of contribution {each.contribution}")
            if result.step > message.step:
                raise _wrong(f"{field}.last_result", f"it is of step {result.step}, and the state of {message.step}")
        former = each.worker
        yield MemberFacts(
            worker=each.worker,
            contribution=each.contribution,
            generation=FIRST_GENERATION,
            acquired=FIRST_GENERATION,
            last_result=None if result is None else msgspec.msgpack.encode(result),
            loaded=each.loaded,
        )


def decode_result(message: step_pb2.StepResult) -> StepResult:
    """Decode the result of a step."""
    telemetry = message.telemetry
    return StepResult(
        step=message.step,
        epoch=message.epoch,
        skipped=message.skipped,
        grad_norm=telemetry.grad_norm,
        non_finite_count=telemetry.non_finite_count,
        groups=tuple(map(_decode_group, telemetry.groups)),
        times=StepTimes(telemetry.receive_seconds, telemetry.queue_seconds, telemetry.apply_seconds),
        accumulated=message.accumulated,
        clipped_grad_norm=telemetry.clipped_grad_norm,
        clip_coefficient=telemetry.clip_coefficient,
        update_norm=telemetry.update_norm if telemetry.HasField("update_norm") else None,
        param_norm=telemetry.param_norm if telemetry.HasField("param_norm") else None,
        loss_scale=telemetry.loss_scale if telemetry.HasField("loss_scale") else None,
        round=_decode_round(message.round) if message.HasField("round") else None,
    )


def _decode_round(message: aggregation_pb2.RoundResult) -> RoundResult:
    return RoundResult(
        contribution=message.contribution,
        dropped=message.dropped,
        members=message.members,
        contributors=tuple(
            Contributor(each.worker, each.weight, each.grad_norm, each.non_finite_count)
            for each in message.contributors
        ),
        waiting_seconds=message.waiting_seconds,
        staleness=message.staleness,
    )


def _decode_group(message: step_pb2.GroupTelemetry) -> GroupResult:
    return GroupResult(
        grad_norm=message.grad_norm,
        hyperparameters=hyperparameters_from_wire(message.hyperparameters),
        t=message.t,
        clipped_grad_norm=message.clipped_grad_norm,
        clip_coefficient=message.clip_coefficient,
        update_norm=message.update_norm if message.HasField("update_norm") else None,
        param_norm=message.param_norm if message.HasField("param_norm") else None,
    )


def _wrong(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError.of(f"numbers.{field}", problem)
