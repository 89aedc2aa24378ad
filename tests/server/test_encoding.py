"""From the domain's records to messages."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from stepwire.codecs import BFLOAT16, FLOAT16
from stepwire.layout import TensorSpec, place
from stepwire.optimizers import Adam
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2
from stepwire_server.config import ServerConfig
from stepwire_server.decoding import decode_plan
from stepwire_server.encoding import encode_record, encode_session
from stepwire_server.engines import CpuEngine
from stepwire_server.memory import MemoryBudget
from stepwire_server.plan import NonFinitePolicy, SessionPlan
from stepwire_server.progress import GroupRecord, StepRecord
from stepwire_server.session import Session

PLAN = SessionPlan(
    layout=place([TensorSpec("w", (2, 3)), TensorSpec("b", (4,), 1)], 2),
    optimizer=Adam(lr=0.5, weight_decay=0.25, decoupled_weight_decay=True, amsgrad=True, formula="no_bias_correction"),
    groups=(Adam(lr=0.5, weight_decay=0.25).hyperparameters(), Adam(lr=0.25).hyperparameters()),
    non_finite=NonFinitePolicy.SKIP,
    gradient_dtype=BFLOAT16,
    reply_dtype=FLOAT16,
    start_at_zero=True,
    lease_seconds=30.0,
    label="run",
)


@pytest.fixture
def session(clock: Any) -> Session:
    engine = CpuEngine(threads=1, use_numba=False)
    return Session("ab" * 16, PLAN, engine, MemoryBudget(1 << 20), epoch=4, clock=clock)


def test_a_session_is_told_whole(session: Session, clock: Any) -> None:
    message = encode_session(session, clock(), whole=True)
    assert (message.session_id, message.epoch, message.device) == ("ab" * 16, 4, "cpu")
    assert (message.applied_step, message.applied_load, message.durable_step) == (0, 0, 0)
    assert (message.ready, message.attached, message.memory_bytes) == (True, False, 4 * 260 * 4)
    assert list(message.layout.slots) == ["param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert (message.layout.size, [group.offset for group in message.layout.groups]) == (260, [0, 256])


def test_a_config_with_its_defaults_filled_in_creates_the_same_again(session: Session, clock: Any) -> None:
    config = encode_session(session, clock(), whole=True).config
    assert decode_plan(config, ServerConfig(), "cpu") == PLAN
    assert config.durability == session_pb2.DURABILITY_MEMORY
    assert config.state_precision == session_pb2.STATE_PRECISION_FLOAT32


@pytest.mark.parametrize("policy", NonFinitePolicy)
@pytest.mark.parametrize("zeros", [False, True])
def test_every_policy_and_start_is_told(policy: NonFinitePolicy, zeros: bool, clock: Any) -> None:
    plan = dataclasses.replace(PLAN, non_finite=policy, start_at_zero=zeros)
    engine = CpuEngine(threads=1, use_numba=False)
    session = Session("ab" * 16, plan, engine, MemoryBudget(1 << 20), epoch=1, clock=clock)
    message = encode_session(session, clock(), whole=True)
    assert optimizer_pb2.NonFinitePolicy.Name(message.config.gradient.non_finite).endswith(policy.name)
    assert (message.ready, decode_plan(message.config, ServerConfig(), "cpu")) == (zeros, plan)


def test_a_listing_leaves_out_what_is_long(session: Session, clock: Any) -> None:
    message = encode_session(session, clock(), whole=False)
    assert (len(message.config.tensors), len(message.config.groups), message.HasField("layout")) == (0, 0, False)
    assert (message.config.label, message.config.lease_seconds) == ("run", 30.0)


def test_times_are_wall_times_whatever_the_clock_counts_from(session: Session, clock: Any) -> None:
    clock.now += 12.0
    session.take_slot()
    session.last_used = clock.now - 2.0
    before = time.time()
    message = encode_session(session, clock(), whole=False)
    after = time.time()
    created, expires = message.create_time.ToNanoseconds() / 1e9, message.expire_time.ToNanoseconds() / 1e9
    assert before - 12.001 <= created <= after - 11.999
    assert before + 27.999 <= expires <= after + 28.001


@pytest.mark.parametrize("replayed", [False, True])
def test_a_record_is_told_whole(replayed: bool) -> None:
    groups = tuple(GroupRecord(float(t), numbers, t) for t, numbers in enumerate(PLAN.groups, 5))
    record = StepRecord(9, 4, True, 1.5, 7, groups, 0.1, 0.2, 0.3, replayed)
    result = step_pb2.StepResult()
    encode_record(record, 3, result)
    assert result == step_pb2.StepResult(
        step=9,
        durable_step=3,
        epoch=4,
        replayed=replayed,
        skipped=True,
        telemetry=step_pb2.Telemetry(
            grad_norm=1.5,
            clipped_grad_norm=1.5,
            clip_coefficient=1.0,
            non_finite_count=7,
            receive_seconds=0.1,
            queue_seconds=0.2,
            apply_seconds=0.3,
            groups=[
                step_pb2.GroupTelemetry(
                    grad_norm=float(t),
                    t=t,
                    hyperparameters=optimizer_pb2.Hyperparameters(
                        lr=numbers.lr,
                        beta1=numbers.beta1,
                        beta2=numbers.beta2,
                        eps=numbers.eps,
                        weight_decay=numbers.weight_decay,
                        maximize=numbers.maximize,
                    ),
                )
                for t, numbers in enumerate(PLAN.groups, 5)
            ],
        ),
    )
