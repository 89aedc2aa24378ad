"""Messages as plain records."""

from __future__ import annotations

import datetime

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from stepwire.optimizers import Hyperparameters
from stepwire.results import GroupResult, ServerInfo, SessionInfo, StepResult
from stepwire.v1 import optimizer_pb2, server_pb2, session_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb


def test_a_step_result_takes_every_value_from_its_message() -> None:
    message = step_pb2.StepResult(
        step=7,
        durable_step=5,
        epoch=2,
        replayed=True,
        skipped=True,
        telemetry=step_pb2.Telemetry(
            grad_norm=1.5,
            clipped_grad_norm=1.25,
            clip_coefficient=0.75,
            non_finite_count=3,
            receive_seconds=0.1,
            queue_seconds=0.2,
            apply_seconds=0.3,
            groups=[
                step_pb2.GroupTelemetry(
                    grad_norm=0.5,
                    clipped_grad_norm=0.25,
                    clip_coefficient=0.125,
                    t=6,
                    hyperparameters=optimizer_pb2.Hyperparameters(
                        lr=0.1, beta1=0.2, beta2=0.3, eps=0.4, weight_decay=0.5, maximize=True
                    ),
                )
            ],
        ),
    )
    numbers = Hyperparameters(lr=0.1, beta1=0.2, beta2=0.3, eps=0.4, weight_decay=0.5, maximize=True)
    assert StepResult.from_wire(message) == StepResult(
        step=7,
        durable_step=5,
        epoch=2,
        replayed=True,
        skipped=True,
        grad_norm=1.5,
        non_finite_count=3,
        groups=(GroupResult(0.5, numbers, 6, 0.25, 0.125),),
        receive_seconds=0.1,
        queue_seconds=0.2,
        apply_seconds=0.3,
        clipped_grad_norm=1.25,
        clip_coefficient=0.75,
    )


def test_what_a_step_result_may_lack_is_taken_where_it_is() -> None:
    """A zero that was sent is no absence."""
    numbers = optimizer_pb2.Hyperparameters(lr=0.5)
    message = step_pb2.StepResult(
        accumulated=True,
        telemetry=step_pb2.Telemetry(
            update_norm=0.0,
            param_norm=2.5,
            loss_scale=1024.0,
            previous_send_seconds=0.0,
            groups=[step_pb2.GroupTelemetry(update_norm=0.0, param_norm=1.5, hyperparameters=numbers)],
        ),
    )
    result = StepResult.from_wire(message)
    assert (result.accumulated, result.update_norm, result.param_norm) == (True, 0.0, 2.5)
    assert (result.loss_scale, result.previous_send_seconds) == (1024.0, 0.0)
    assert (result.groups[0].update_norm, result.groups[0].param_norm) == (0.0, 1.5)
    group = step_pb2.GroupTelemetry(hyperparameters=numbers)
    bare = StepResult.from_wire(step_pb2.StepResult(telemetry=step_pb2.Telemetry(groups=[group])))
    assert (bare.accumulated, bare.update_norm, bare.param_norm) == (False, None, None)
    assert (bare.loss_scale, bare.previous_send_seconds) == (None, None)
    assert (bare.groups[0].update_norm, bare.groups[0].param_norm) == (None, None)


def test_a_session_info_takes_every_value_and_times_in_utc() -> None:
    message = session_pb2.Session(
        session_id="ab" * 16,
        epoch=1,
        applied_step=9,
        durable_step=4,
        applied_load=2,
        memory_bytes=1200,
        device="cpu",
        ready=True,
        attached=True,
        config=session_pb2.SessionConfig(label="run 7"),
        create_time=Timestamp(seconds=1_000_000_000),
        expire_time=Timestamp(seconds=1_000_003_600, nanos=500_000_000),
        idle=Duration(seconds=7, nanos=250_000_000),
    )
    created = datetime.datetime(2001, 9, 9, 1, 46, 40, tzinfo=datetime.UTC)
    assert SessionInfo.from_wire(message) == SessionInfo(
        session_id="ab" * 16,
        label="run 7",
        epoch=1,
        applied_step=9,
        durable_step=4,
        memory_bytes=1200,
        device="cpu",
        ready=True,
        attached=True,
        create_time=created,
        expire_time=created + datetime.timedelta(hours=1, seconds=0.5),
        idle_seconds=7.25,
    )


@pytest.mark.parametrize("draining", [False, True])
def test_a_server_info_takes_every_value(draining: bool) -> None:
    message = pb.GetServerInfoResponse(
        version="9.8.7",
        protocol_min=1,
        protocol_max=3,
        instance_id="cafe",
        devices=[
            server_pb2.DeviceInfo(name="cuda:0", description="GPU", memory_bytes=30, budget_bytes=20, reserved_bytes=10)
        ],
        limits=server_pb2.Limits(max_chunk_bytes=4096),
        features=["overlap", "schedules"],
        sessions=5,
        draining=draining,
        not_serving="a standby",
        shard="a",
        epoch=3,
    )
    assert ServerInfo.from_wire(message) == ServerInfo(
        version="9.8.7",
        protocol_min=1,
        protocol_max=3,
        instance_id="cafe",
        devices={
            "cuda:0": {"description": "GPU", "memory_bytes": 30, "budget_bytes": 20, "reserved_bytes": 10},
        },
        features=("overlap", "schedules"),
        sessions=5,
        max_chunk_bytes=4096,
        draining=draining,
        not_serving="a standby",
        shard="a",
        epoch=3,
    )
