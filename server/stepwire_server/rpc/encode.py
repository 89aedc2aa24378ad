"""From the domain's records to the contract's messages."""

from __future__ import annotations

import datetime
import math
import time

from google.protobuf.timestamp_pb2 import Timestamp

from stepwire.optimizers.aggregation import aggregation_to_wire
from stepwire.optimizers.durability import durability_to_wire
from stepwire.optimizers.gradient_treatment import treatment_to_wire
from stepwire.optimizers.schedules import schedule_to_wire
from stepwire.v1 import aggregation_pb2, checkpoint_pb2, server_pb2, session_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.dtypes import dtype_to_wire
from stepwire.wire.messages import (
    PRECISIONS,
    duration_to_wire,
    hyperparameters_to_wire,
    layout_to_wire,
    optimizer_to_wire,
    spec_to_wire,
)
from stepwire_server.devices.pool import Device
from stepwire_server.durability.checkpoint import CheckpointInfo
from stepwire_server.records.round_result import RoundResult
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_result import GroupResult, StepResult
from stepwire_server.sessions.parked import ParkedSession
from stepwire_server.sessions.session import Session
from stepwire_server.steps.check_gradient import GradientCheck

__all__ = [
    "encode_checkpoint",
    "encode_config",
    "encode_device",
    "encode_gradient_check",
    "encode_parked",
    "encode_result",
    "encode_session",
]


def encode_session(session: Session, now: float, *, whole: bool) -> session_pb2.Session:
    """Encode a session as it stands.

    Args:
        session: which.
        now: reading of the session's clock, which is monotonic; the wall clock is read here.
        whole: with tensors, groups and layout.
    """
    wall, ledger = time.time(), session.ledger
    message = session_pb2.Session(
        session_id=session.session_id,
        epoch=ledger.epoch,
        applied_step=ledger.applied_step,
        durable_step=ledger.durable_step,
        applied_load=ledger.applied_load,
        config=encode_config(session.config, whole=whole),
        memory_bytes=session.memory_bytes,
        device=session.device,
        ready=ledger.ready,
        attached=ledger.attached,
        create_time=_timestamp(wall + session.created - now),
        expire_time=_timestamp(wall + session.last_use.at + session.config.lease_seconds - now),
        loss_scale=session.loss_scale,
        state=session_pb2.LIFECYCLE_STATE_ACTIVE,
        idle=duration_to_wire(session.idle_seconds(now) or 0.0),
    )
    if session.config.aggregation is not None:
        message.members.extend(
            aggregation_pb2.Member(
                worker=member.worker.index, attached=member.worker.attached, contribution=member.number
            )
            for member in ledger.members
        )
    message.tables.extend(session_pb2.TableUse(name=name, **use) for name, use in session.table_use().items())
    if whole:
        message.layout.CopyFrom(layout_to_wire(session.config.layout, session.slots))
    return message


def encode_parked(session: ParkedSession) -> session_pb2.Session:
    """Encode a session that is on disk alone, without tensors, groups and layout."""
    return session_pb2.Session(
        session_id=session.session_id,
        epoch=session.epoch,
        applied_step=session.step,
        durable_step=session.durable_step,
        applied_load=session.load,
        config=encode_config(session.config, whole=False),
        ready=session.ready,
        create_time=_timestamp(session.create_time),
        state=session_pb2.LIFECYCLE_STATE_PARKED,
    )


def encode_device(device: Device, reserved_bytes: int) -> server_pb2.DeviceInfo:
    """Encode a device with its budget, and the bytes of it that the caller may know of."""
    info, budget = device.engine.device, device.budget
    return server_pb2.DeviceInfo(
        name=info.name,
        description=info.description,
        memory_bytes=info.memory_bytes,
        budget_bytes=budget.limit_bytes,
        reserved_bytes=reserved_bytes,
    )


def encode_checkpoint(info: CheckpointInfo) -> checkpoint_pb2.Checkpoint:
    """Encode one line of a list of checkpoints."""
    message = checkpoint_pb2.Checkpoint(
        name=info.name,
        step=info.step,
        load=info.load,
        bytes=info.nbytes,
        damage=info.damage or "",
        stored=info.stored,
        store_problem=info.store_problem,
    )
    if info.created:
        message.create_time.FromDatetime(datetime.datetime.fromisoformat(info.created))
    return message


def encode_gradient_check(check: GradientCheck) -> bytes:
    """Encode the facts that a coordinator decides by."""
    squares = check.squared_norms
    message = step_pb2.GradientCheck(
        squared_norm=math.fsum(squares), non_finite_count=check.non_finite_count, group_squared_norms=squares
    )
    return pb.AttachResponse(gradient_check=message).SerializeToString()


def encode_result(result: StepResult, durable_step: int, message: step_pb2.StepResult) -> None:
    """Encode a step's result into a message; in place, as a nested message that is assigned is copied."""
    message.step = result.step
    message.durable_step = durable_step
    message.epoch = result.epoch
    message.replayed = result.replayed
    message.skipped = result.skipped
    message.accumulated = result.accumulated
    telemetry = message.telemetry
    telemetry.grad_norm = result.grad_norm
    telemetry.clipped_grad_norm = result.clipped_grad_norm
    telemetry.clip_coefficient = result.clip_coefficient
    telemetry.non_finite_count = result.non_finite_count
    telemetry.receive_seconds, telemetry.queue_seconds, telemetry.apply_seconds, _ = result.times
    if result.update_norm is not None and result.param_norm is not None:
        telemetry.update_norm, telemetry.param_norm = result.update_norm, result.param_norm
    if result.loss_scale is not None:
        telemetry.loss_scale = result.loss_scale
    for group in result.groups:
        _encode_group(group, telemetry.groups.add())
    if result.round is not None:
        _encode_round(result.round, message.round)


def _encode_round(part: RoundResult, message: aggregation_pb2.RoundResult) -> None:
    message.contribution, message.dropped, message.members = part.contribution, part.dropped, part.members
    message.waiting_seconds, message.staleness = part.waiting_seconds, part.staleness
    for worker, weight, norm, count in part.contributors:
        message.contributors.add(worker=worker, weight=weight, grad_norm=norm, non_finite_count=count)


def _encode_group(group: GroupResult, message: step_pb2.GroupTelemetry) -> None:
    message.grad_norm = group.grad_norm
    message.t = group.t
    message.clipped_grad_norm = group.clipped_grad_norm
    message.clip_coefficient = group.clip_coefficient
    message.hyperparameters.CopyFrom(hyperparameters_to_wire(group.hyperparameters))
    if group.update_norm is not None and group.param_norm is not None:
        message.update_norm, message.param_norm = group.update_norm, group.param_norm


def _telemetry(config: SessionConfig) -> session_pb2.TelemetryLevel:
    if not config.tells_norms:
        return session_pb2.TELEMETRY_LEVEL_NONE
    return session_pb2.TELEMETRY_LEVEL_FULL if config.measures else session_pb2.TELEMETRY_LEVEL_GRADIENT


def encode_config(config: SessionConfig, *, whole: bool) -> session_pb2.SessionConfig:
    """Encode the config of a session; `whole` includes its tensors and groups."""
    message = session_pb2.SessionConfig(
        optimizer=optimizer_to_wire(config.optimizer),
        gradient=treatment_to_wire(config.treatment),
        initialization=(session_pb2.INITIALIZATION_ZEROS if config.start_at_zero else session_pb2.INITIALIZATION_LOAD),
        gradient_dtype=dtype_to_wire(config.gradient_dtype),
        reply_dtype=dtype_to_wire(config.reply_dtype),
        state_precision=PRECISIONS[config.precision.value],
        telemetry=_telemetry(config),
        lease=duration_to_wire(config.lease_seconds),
        label=config.label,
        device=config.device,
    )
    durability_to_wire(config.durability, message)
    if config.aggregation is not None:
        message.aggregation.CopyFrom(aggregation_to_wire(config.aggregation))
    if whole:
        specs = {tensor.spec.name: tensor.spec for tensor in config.layout.tensors}
        message.tensors.extend(spec_to_wire(specs[name]) for name in config.layout.names)
        groups = zip(config.groups, config.group_precisions, config.schedules, config.group_clips, strict=True)
        for hyper, precision, schedule, clip in groups:
            group_message = message.groups.add(
                overrides=hyperparameters_to_wire(hyper), state_precision=PRECISIONS[precision.value]
            )
            if schedule is not None:
                group_message.schedule.CopyFrom(schedule_to_wire(schedule))
            if clip is not None:
                group_message.clip_grad_norm = clip
    return message


def _timestamp(seconds: float) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(datetime.datetime.fromtimestamp(seconds, datetime.UTC))
    return message
