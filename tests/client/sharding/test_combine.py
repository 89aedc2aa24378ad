"""One result of several, against what one session says of the same step."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stepwire.optimizers.norms import GradientNorms
from stepwire.sharding.combine import combined
from stepwire.sharding.coordinator import Decision
from stepwire.v1 import optimizer_pb2, step_pb2


def result(norms: list[float], t: list[int], **fields: Any) -> step_pb2.StepResult:
    """Return what a shard says whose groups have such norms."""
    telemetry = step_pb2.Telemetry(
        grad_norm=math.hypot(*norms),
        clipped_grad_norm=math.hypot(*norms),
        clip_coefficient=0.25,
        update_norm=3.0,
        param_norm=6.0,
        groups=[
            step_pb2.GroupTelemetry(
                grad_norm=norm,
                t=updates,
                clipped_grad_norm=norm,
                clip_coefficient=0.25,
                update_norm=3.0,
                param_norm=6.0,
                hyperparameters=optimizer_pb2.Hyperparameters(lr=0.1 * updates),
            )
            for norm, updates in zip(norms, t, strict=True)
        ],
        **fields,
    )
    return step_pb2.StepResult(step=7, epoch=len(t), durable_step=t[0], telemetry=telemetry)


SHARDS = [
    result([3.0, 0.0], [4, 0], receive_seconds=1.0, queue_seconds=5.0, apply_seconds=2.0, non_finite_count=1),
    result([4.0, 12.0], [4, 6], receive_seconds=3.0, queue_seconds=1.0, apply_seconds=2.0, previous_send_seconds=0.5),
]
RULING = Decision(
    GradientNorms((5.5, 12.5), 13.5, (0.25, 0.125), 0.25, 8.0), step_pb2.StepCommit(clip_coefficient=0.25)
)


def test_parts_add_up() -> None:
    whole = combined(SHARDS, None, limited=False)
    telemetry = whole.telemetry
    assert (whole.step, whole.epoch, whole.durable_step, whole.replayed) == (7, 2, 4, False)
    assert (telemetry.grad_norm, telemetry.clipped_grad_norm, telemetry.clip_coefficient) == (13.0, 13.0, 0.25)
    assert [(group.grad_norm, group.clipped_grad_norm, group.t) for group in telemetry.groups] == [
        (5.0, 5.0, 4),
        (12.0, 12.0, 6),
    ]
    assert [group.hyperparameters.lr for group in telemetry.groups] == [0.1 * 4, 0.1 * 6]
    assert (telemetry.receive_seconds, telemetry.queue_seconds, telemetry.apply_seconds) == (3.0, 5.0, 2.0)
    assert (telemetry.previous_send_seconds, telemetry.non_finite_count) == (0.5, 1)
    assert (telemetry.update_norm, telemetry.param_norm) == pytest.approx((math.sqrt(18), math.sqrt(72)), rel=1e-15)
    assert not telemetry.HasField("loss_scale")


def test_what_was_decided_is_told_as_decided() -> None:
    telemetry = combined(SHARDS, RULING, limited=False).telemetry
    assert (telemetry.grad_norm, telemetry.clipped_grad_norm) == (13.5, 8.0 * 0.25)
    assert [(group.grad_norm, group.clipped_grad_norm) for group in telemetry.groups] == [
        (5.5, 5.5 * 0.25),
        (12.5, 12.5 * 0.125),
    ]


def test_after_clipping_by_value_the_shards_know_the_norms() -> None:
    telemetry = combined(SHARDS, RULING, limited=True).telemetry
    assert telemetry.grad_norm == 13.5
    assert telemetry.clipped_grad_norm == pytest.approx(13.0, rel=1e-15)
    assert [group.clipped_grad_norm for group in telemetry.groups] == [5.0, 12.0]


@pytest.mark.parametrize("kind", ["skipped", "accumulated"])
def test_a_step_that_updates_nothing_has_clipped_nothing(kind: str) -> None:
    shards = []
    for each in SHARDS:
        copy = step_pb2.StepResult(**{kind: True})
        copy.MergeFrom(each)
        for part in (copy.telemetry, *copy.telemetry.groups):
            part.ClearField("update_norm")
            if kind == "skipped":
                part.clipped_grad_norm = 0.0
        shards.append(copy)
    whole = combined(shards, RULING, limited=True)
    telemetry = whole.telemetry
    assert getattr(whole, kind)
    assert not telemetry.HasField("update_norm")
    expected = (0.0, 0.0, 0.0) if kind == "skipped" else (13.5, 5.5, 12.5)
    assert (telemetry.clipped_grad_norm, *(group.clipped_grad_norm for group in telemetry.groups)) == expected
    assert telemetry.grad_norm == 13.5


def test_a_replay_is_one_where_all_replayed() -> None:
    replays = [step_pb2.StepResult(step=7, replayed=replayed) for replayed in (True, False)]
    assert not combined(replays, None, limited=False).replayed
    assert combined(replays[:1] * 2, None, limited=False).replayed


def test_the_norm_of_what_is_not_finite_is_not() -> None:
    parts = [result([math.inf], [1]), result([math.nan], [1])]
    assert math.isnan(combined(parts, None, limited=False).telemetry.grad_norm)
    assert combined([parts[0], result([1.0], [1])], None, limited=False).telemetry.grad_norm == math.inf


def test_one_shard_speaks_for_itself() -> None:
    assert combined(SHARDS[1:], RULING, limited=False) is SHARDS[1]


@pytest.mark.parametrize("late", [0, 1])
def test_a_contribution_that_one_part_has_dropped_has_the_measurements_of_the_other(late: int) -> None:
    parts = [step_pb2.StepResult(), step_pb2.StepResult()]
    for part, shard in zip(parts, SHARDS, strict=True):
        part.CopyFrom(shard)
        part.round.contribution = 2
        part.round.contributors.add(worker=0, weight=1.0, grad_norm=shard.telemetry.grad_norm)
    kept = parts[1 - late].telemetry
    kept.grad_norm = math.hypot(3.0, 4.0)
    parts[1 - late].round.contributors[0].grad_norm = kept.grad_norm
    parts[late].ClearField("telemetry")
    del parts[late].round.contributors[:]
    parts[late].round.dropped = True
    whole = combined(parts, None, limited=False)
    assert (whole.round.contribution, whole.round.dropped) == (2, True)
    assert (whole.telemetry.grad_norm, len(whole.telemetry.groups)) == (kept.grad_norm, 2)
    assert [each.grad_norm for each in whole.round.contributors] == [kept.grad_norm]
    for part in parts:
        part.ClearField("telemetry")
        part.round.dropped = True
    assert combined(parts, None, limited=False).telemetry.grad_norm == 0.0
