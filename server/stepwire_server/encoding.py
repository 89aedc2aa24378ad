"""From the domain's records to the contract's messages."""

from __future__ import annotations

import datetime
import time

from google.protobuf.timestamp_pb2 import Timestamp

from stepwire.codecs import dtype_to_wire
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2
from stepwire.wire import hyperparameters_to_wire, layout_to_wire, optimizer_to_wire, spec_to_wire
from stepwire_server.plan import NonFinitePolicy, SessionPlan
from stepwire_server.progress import StepRecord
from stepwire_server.session import Session

__all__ = ["encode_record", "encode_session"]

_POLICIES = {
    NonFinitePolicy.REJECT: optimizer_pb2.NON_FINITE_POLICY_REJECT,
    NonFinitePolicy.SKIP: optimizer_pb2.NON_FINITE_POLICY_SKIP,
    NonFinitePolicy.ALLOW: optimizer_pb2.NON_FINITE_POLICY_ALLOW,
}


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
        config=_encode_plan(session.plan, whole=whole),
        memory_bytes=session.memory_bytes,
        device=session.device,
        ready=ledger.ready,
        attached=ledger.slot.attached,
        create_time=_timestamp(wall + session.created - now),
        expire_time=_timestamp(wall + session.last_used + session.plan.lease_seconds - now),
    )
    if whole:
        message.layout.CopyFrom(layout_to_wire(session.plan.layout, session.slots))
    return message


def encode_record(record: StepRecord, durable_step: int, result: step_pb2.StepResult) -> None:
    """Encode what a step did into a message; in place, as a nested message that is assigned is copied."""
    result.step = record.step
    result.durable_step = durable_step
    result.epoch = record.epoch
    result.replayed = record.replayed
    result.skipped = record.skipped
    telemetry = result.telemetry
    telemetry.grad_norm = telemetry.clipped_grad_norm = record.grad_norm
    telemetry.clip_coefficient = 1.0
    telemetry.non_finite_count = record.non_finite_count
    telemetry.receive_seconds = record.receive_seconds
    telemetry.queue_seconds = record.queue_seconds
    telemetry.apply_seconds = record.apply_seconds
    for group in record.groups:
        telemetry.groups.add(
            grad_norm=group.grad_norm, t=group.t, hyperparameters=hyperparameters_to_wire(group.hyperparameters)
        )


def _encode_plan(plan: SessionPlan, *, whole: bool) -> session_pb2.SessionConfig:
    config = session_pb2.SessionConfig(
        optimizer=optimizer_to_wire(plan.optimizer),
        gradient=optimizer_pb2.GradientTreatment(non_finite=_POLICIES[plan.non_finite]),
        durability=session_pb2.DURABILITY_MEMORY,
        initialization=(session_pb2.INITIALIZATION_ZEROS if plan.start_at_zero else session_pb2.INITIALIZATION_LOAD),
        gradient_dtype=dtype_to_wire(plan.gradient_dtype),
        reply_dtype=dtype_to_wire(plan.reply_dtype),
        state_precision=session_pb2.STATE_PRECISION_FLOAT32,
        lease_seconds=plan.lease_seconds,
        label=plan.label,
    )
    if whole:
        config.tensors.extend(spec_to_wire(tensor.spec) for tensor in plan.layout.tensors)
        config.groups.extend(
            optimizer_pb2.ParameterGroup(overrides=hyperparameters_to_wire(group)) for group in plan.groups
        )
    return config


def _timestamp(seconds: float) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(datetime.datetime.fromtimestamp(seconds, datetime.UTC))
    return message
