"""From the domain's records to messages."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, get_args

import pytest
from google.protobuf.duration_pb2 import Duration

from stepwire.layout import TensorSpec
from stepwire.optimizers import OPTIMIZERS, Adam, AdamW
from stepwire.optimizers.gradient_treatment import GradientTreatment, LossScaling, NonFinite
from stepwire.optimizers.schedules import Schedule
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2
from stepwire.wire.dtypes import BFLOAT16, FLOAT16
from stepwire_server.config import ServerConfig
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.devices.pool import Device
from stepwire_server.engines import CpuEngine
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_result import GroupResult, StepResult, StepTimes
from stepwire_server.rpc.decode_config import decode_session_config
from stepwire_server.rpc.encode import encode_result, encode_session
from stepwire_server.rules import Precision
from stepwire_server.sessions.session import Session
from tests.server.configs import make_config

CONFIG = make_config(
    TensorSpec("w", (2, 3)),
    TensorSpec("b", (4,), 1, frozen=True),
    optimizer=AdamW(lr=0.5, weight_decay=0.25, amsgrad=True, formula="no_bias_correction"),
    groups=(Adam(lr=0.5, weight_decay=0.25).hyperparameters(), Adam(lr=0.25).hyperparameters()),
    schedules=(None, Schedule.polynomial(7, 2.0, final_factor=0.5, warmup_steps=3, warmup_start_factor=0.25)),
    group_clips=(0.5, None),
    treatment=GradientTreatment(non_finite="skip", clip_formula="torch"),
    gradient_dtype=BFLOAT16,
    reply_dtype=FLOAT16,
    lease_seconds=30.0,
    label="run",
    device="cpu",
)

NO_TIMES = StepTimes(0.0, 0.0, 0.0)


@pytest.fixture
def session(clock: Any) -> Session:
    device = Device(CpuEngine(threads=1, use_numba=False), MemoryBudget(1 << 20))
    return Session("ab" * 16, CONFIG, device, epoch=4, clock=clock)


def test_a_session_is_told_whole(session: Session, clock: Any) -> None:
    message = encode_session(session, clock(), whole=True)
    assert (message.session_id, message.epoch, message.device) == ("ab" * 16, 4, "cpu")
    assert (message.applied_step, message.applied_load, message.durable_step) == (0, 0, 0)
    assert (message.ready, message.attached, message.memory_bytes) == (True, False, 4 * 260 * 4)
    assert message.state == session_pb2.LIFECYCLE_STATE_ACTIVE
    assert list(message.layout.slots) == ["param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert (message.layout.size, [group.offset for group in message.layout.groups]) == (260, [0, 256])


def test_a_config_with_its_defaults_filled_in_creates_the_same_again(session: Session, clock: Any) -> None:
    config = encode_session(session, clock(), whole=True).config
    assert decode_session_config(config, ServerConfig()) == CONFIG
    assert config.durability == session_pb2.DURABILITY_MEMORY
    assert config.state_precision == session_pb2.STATE_PRECISION_FLOAT32


def told(config: SessionConfig, clock: Any) -> session_pb2.Session:
    device = Device(CpuEngine(threads=1, use_numba=False), MemoryBudget(1 << 20))
    return encode_session(Session("ab" * 16, config, device, epoch=1, clock=clock), clock(), whole=True)


@pytest.mark.parametrize("policy", get_args(NonFinite))
@pytest.mark.parametrize("zeros", [False, True])
def test_every_policy_and_start_is_told(policy: NonFinite, zeros: bool, clock: Any) -> None:
    treatment = dataclasses.replace(CONFIG.treatment, non_finite=policy)
    config = dataclasses.replace(CONFIG, treatment=treatment, start_at_zero=zeros)
    message = told(config, clock)
    assert optimizer_pb2.NonFinitePolicy.Name(message.config.gradient.non_finite).endswith(policy.upper())
    assert (message.ready, decode_session_config(message.config, ServerConfig())) == (zeros, config)


@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BFLOAT16])
def test_every_rule_and_precision_is_told(rule: str, precision: Precision, clock: Any) -> None:
    treatment = GradientTreatment(non_finite="reject")
    config = make_config(
        TensorSpec("w", (2, 3)), optimizer=OPTIMIZERS[rule](), precision=precision, treatment=treatment, measures=False
    )
    assert decode_session_config(told(config, clock).config, ServerConfig()) == dataclasses.replace(
        config, lease_seconds=60.0
    )


def test_every_treatment_is_told(clock: Any) -> None:
    treatment = GradientTreatment(
        non_finite="skip",
        clip_grad_norm=1.5,
        clip_formula="keras",
        clip_grad_value=0.5,
        accumulation_steps=4,
        loss_scaling=LossScaling(initial_scale=8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=5),
        parameter_average_decay=0.75,
    )
    config = make_config(TensorSpec("w", (5000,)), TensorSpec("b", (3,)), treatment=treatment, precision=Precision.INT8)
    message = told(config, clock)
    assert decode_session_config(message.config, ServerConfig()) == config
    assert message.loss_scale == 8.0
    assert list(message.layout.slots) == [
        "param",
        "exp_avg",
        "exp_avg_scale",
        "exp_avg_sq",
        "exp_avg_sq_scale",
        "grad_accumulation",
        "param_average",
    ]
    assert message.layout.chunk_alignment == 256


def test_the_precisions_of_groups_and_tensors_are_told(clock: Any) -> None:
    specs = (TensorSpec("a", (5,), state_precision="int8"), TensorSpec("b", (5,), 1, state_precision="bfloat16"))
    config = make_config(
        *specs,
        groups=(Adam().hyperparameters(),) * 2,
        group_precisions=(Precision.FLOAT32, Precision.INT8),
        treatment=GradientTreatment(non_finite="reject"),
    )
    message = told(config, clock)
    assert [group.state_precision for group in message.config.groups] == [1, 3]
    assert [tensor.state_precision for tensor in message.config.tensors] == [3, 2]
    assert [tensor.spec.state_precision for tensor in message.layout.tensors] == [3, 2]
    assert decode_session_config(message.config, ServerConfig()) == config


def test_a_session_without_loss_scaling_tells_no_scale(session: Session, clock: Any) -> None:
    assert not encode_session(session, clock(), whole=True).HasField("loss_scale")


def test_a_listing_leaves_out_what_is_long(session: Session, clock: Any) -> None:
    message = encode_session(session, clock(), whole=False)
    assert (len(message.config.tensors), len(message.config.groups), message.HasField("layout")) == (0, 0, False)
    assert (message.config.label, message.config.lease) == ("run", Duration(seconds=30))


def test_times_are_wall_times_whatever_the_clock_counts_from(session: Session, clock: Any) -> None:
    clock.now += 12.0
    session.acquire()
    session.last_use.at = clock.now - 2.0
    before = time.time()
    message = encode_session(session, clock(), whole=False)
    after = time.time()
    created, expires = message.create_time.ToNanoseconds() / 1e9, message.expire_time.ToNanoseconds() / 1e9
    assert before - 12.001 <= created <= after - 11.999
    assert before + 27.999 <= expires <= after + 28.001


@pytest.mark.parametrize("replayed", [False, True])
def test_a_result_is_told_whole(replayed: bool) -> None:
    groups = tuple(GroupResult(float(t), numbers, t) for t, numbers in enumerate(CONFIG.groups, 5))
    result = StepResult(9, 4, True, 1.5, 7, groups, StepTimes(0.1, 0.2, 0.3), clipped_grad_norm=1.5, replayed=replayed)
    message = step_pb2.StepResult()
    encode_result(result, 3, message)
    assert message == step_pb2.StepResult(
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
                    clip_coefficient=1.0,
                    hyperparameters=optimizer_pb2.Hyperparameters(
                        lr=numbers.lr,
                        beta1=numbers.beta1,
                        beta2=numbers.beta2,
                        eps=numbers.eps,
                        weight_decay=numbers.weight_decay,
                        maximize=numbers.maximize,
                    ),
                )
                for t, numbers in enumerate(CONFIG.groups, 5)
            ],
        ),
    )


def test_what_was_measured_and_scaled_is_told() -> None:
    group = GroupResult(2.0, CONFIG.groups[0], 3, 1.0, 0.5, 0.25, 8.0)
    result = StepResult(
        9,
        4,
        False,
        2.5,
        0,
        (group,),
        NO_TIMES,
        accumulated=True,
        clipped_grad_norm=1.25,
        clip_coefficient=0.75,
        update_norm=0.125,
        param_norm=9.0,
        loss_scale=1024.0,
    )
    message = step_pb2.StepResult()
    encode_result(result, 0, message)
    telemetry, told = message.telemetry, message.telemetry.groups[0]
    assert (message.accumulated, message.skipped) == (True, False)
    assert (telemetry.clipped_grad_norm, telemetry.clip_coefficient) == (1.25, 0.75)
    assert (telemetry.update_norm, telemetry.param_norm, telemetry.loss_scale) == (0.125, 9.0, 1024.0)
    assert (told.clipped_grad_norm, told.clip_coefficient, told.update_norm, told.param_norm) == (1.0, 0.5, 0.25, 8.0)


def test_what_was_not_measured_or_scaled_is_left_unset() -> None:
    result = StepResult(9, 4, False, 2.5, 0, (GroupResult(2.0, CONFIG.groups[0], 3),), NO_TIMES)
    message = step_pb2.StepResult()
    encode_result(result, 0, message)
    for part, names in (
        (message.telemetry, ("update_norm", "param_norm", "loss_scale")),
        (message.telemetry.groups[0], ("update_norm", "param_norm")),
    ):
        assert [name for name in names if part.HasField(name)] == []
