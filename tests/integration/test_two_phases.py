"""Two-phase commits over a real connection: the check, the decision, and a break between the two."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.v1 import optimizer_pb2, session_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from tests.support.raw import RawClient, RawStream, Refused, commit, step_message

SIZE = 600
GRADIENT = np.linspace(-3.0, 5.0, SIZE).astype(np.float32)
SKIP = optimizer_pb2.NON_FINITE_POLICY_SKIP


@pytest.fixture
def create(raw: RawClient) -> Callable[..., tuple[str, RawStream]]:
    """Create a session of two groups, and attach to it."""

    def created(**treatment: Any) -> tuple[str, RawStream]:
        config = session_pb2.SessionConfig(
            tensors=[
                tensor_pb2.TensorSpec(name="w", shape=[256]),
                tensor_pb2.TensorSpec(name="b", shape=[SIZE - 256], group=1),
            ],
            groups=[optimizer_pb2.ParameterGroup(), optimizer_pb2.ParameterGroup()],
            optimizer=optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM),
            gradient=optimizer_pb2.GradientTreatment(**{"two_phase": True} | treatment),
            initialization=session_pb2.INITIALIZATION_ZEROS,
        )
        session = raw.call(
            "CreateSession", pb.CreateSessionRequest(request_id="r" + str(len(treatment)), config=config)
        )
        stream = raw.attach(session.session.session_id)
        assert stream.receive() is not None
        return session.session.session_id, stream

    return created


def decision(**fields: Any) -> pb.AttachRequest:
    return pb.AttachRequest(commit=step_pb2.StepCommit(**fields))


def checked(stream: RawStream, step: int = 1, gradient: Any = GRADIENT) -> step_pb2.GradientCheck:
    stream.send(step_message(step, gradient))
    answer = stream.receive()
    assert answer is not None
    assert answer.HasField("gradient_check")
    assert not answer.HasField("result")
    return answer.gradient_check


def pulled(raw: RawClient, session_id: str) -> Any:
    messages = raw._stub.Pull(pb.PullRequest(session_id=session_id))
    return np.concatenate([np.frombuffer(m.payload, np.float32) for m in messages if m.payload])


def test_the_first_half_tells_the_sums_and_changes_nothing(raw: RawClient, create: Any) -> None:
    session_id, stream = create()
    sums = checked(stream)
    squares = GRADIENT.astype(np.float64) ** 2
    expected = [math.fsum(squares[:256]), math.fsum(squares[256:])]
    assert list(sums.group_squared_norms) == pytest.approx(expected, rel=1e-14)
    assert sums.squared_norm == math.fsum(sums.group_squared_norms)
    assert sums.non_finite_count == 0
    assert not pulled(raw, session_id).any()
    assert stream.step(decision(clip_coefficient=1.0)).step == 1
    assert pulled(raw, session_id).all()


def test_the_second_half_brings_the_factors(raw: RawClient, create: Any, client: stepwire.Client) -> None:
    session_id, stream = create()
    checked(stream)
    result = stream.step(decision(clip_coefficient=0.5, group_coefficients=[1.0, 0.25]))
    groups = result.telemetry.groups
    assert result.telemetry.clip_coefficient == 0.5
    assert [group.clip_coefficient for group in groups] == [0.5, 0.125]
    assert [group.clipped_grad_norm for group in groups] == [
        group.grad_norm * factor for group, factor in zip(groups, [0.5, 0.125], strict=True)
    ]
    scaled = {"w": GRADIENT[:256] * np.float32(0.5), "b": GRADIENT[256:] * np.float32(0.125)}
    zeros = {name: np.zeros_like(values) for name, values in scaled.items()}
    with client.create_session(zeros, groups=[{"params": ["w"]}, {"params": ["b"]}]) as plain:
        expected = plain.step(scaled)
        moments = plain.state().slots
    assert pulled(raw, session_id).tobytes() == np.concatenate([expected["w"], expected["b"]]).tobytes()
    with contextlib.closing(client.session(session_id)) as held:
        assert held.state().slots["exp_avg"]["b"].tobytes() == moments["exp_avg"]["b"].tobytes()


def test_a_repeated_step_brings_its_factor_at_once(raw: RawClient, create: Any) -> None:
    session_id, stream = create()
    checked(stream)
    stream.cancel()
    again = raw.attach(session_id)
    opened = again.receive()
    assert opened is not None
    assert opened.opened.applied_step == 0
    known = step_message(1, GRADIENT)
    known.commit.clip_coefficient = 0.5
    first = again.step(known)
    assert (first.step, first.replayed, first.telemetry.clip_coefficient) == (1, False, 0.5)
    replay = again.step(step_message(1, GRADIENT))
    assert (replay.step, replay.replayed, replay.telemetry.clip_coefficient) == (1, True, 0.5)


def test_one_shard_skips_because_another_must(raw: RawClient, create: Any) -> None:
    session_id, stream = create(non_finite=SKIP)
    checked(stream)
    result = stream.step(decision(skip=True))
    assert (result.step, result.skipped, result.telemetry.non_finite_count) == (1, True, 0)
    assert not pulled(raw, session_id).any()
    checked(stream, 2)
    result = stream.step(decision(clip_coefficient=1.0))
    assert (result.step, result.skipped, result.telemetry.groups[0].t) == (2, False, 1)


def test_the_last_step_of_an_accumulation_drops_it_everywhere(raw: RawClient, create: Any) -> None:
    """A shard whose gradient is not finite tells so again at the end, when the coordinator can skip the update."""
    session_id, stream = create(non_finite=SKIP, accumulation_steps=2)
    bad = GRADIENT.copy()
    bad[3] = np.nan
    assert checked(stream, 1, bad).non_finite_count == 1
    result = stream.step(decision(skip=True))
    assert (result.accumulated, result.skipped, result.telemetry.non_finite_count) == (True, False, 1)
    assert checked(stream, 2).non_finite_count == 1, "of the sum"
    result = stream.step(decision(skip=True))
    assert (result.accumulated, result.skipped, result.telemetry.non_finite_count) == (False, True, 1)
    for step in (3, 4):
        assert checked(stream, step).non_finite_count == 0
        result = stream.step(decision(clip_coefficient=1.0))
        assert (result.accumulated, result.skipped) == (step == 3, False)
    assert pulled(raw, session_id).all()


def test_nan_is_counted_for_the_coordinator(create: Any) -> None:
    _, stream = create(non_finite=SKIP)
    bad = GRADIENT.copy()
    bad[[3, 400]] = np.nan, np.inf
    sums = checked(stream, 1, bad)
    assert sums.non_finite_count == 2
    assert not math.isfinite(sums.squared_norm)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (commit(), "the second commit brings `clip_coefficient`"),
        (step_message(1, GRADIENT, slice(0, 4), begin=False), "after `gradient_check` comes a commit alone"),
        (pb.AttachRequest(), "after `gradient_check` comes a commit alone"),
    ],
)
def test_only_a_decision_follows_the_first_half(create: Any, message: pb.AttachRequest, text: str) -> None:
    _, stream = create()
    checked(stream)
    with pytest.raises(Refused, match=text) as refused:
        stream.step(message)
    assert refused.value.row == ("INVALID_ARGUMENT", "INVALID_FRAME")


def test_such_a_session_takes_no_step_in_one_call(raw: RawClient, create: Any) -> None:
    session_id, stream = create()
    stream.cancel()
    with pytest.raises(Refused, match="commits in two messages"):
        raw.step(session_id, 2, 1, GRADIENT)


def test_the_bounds_are_the_coordinators_to_apply(raw: RawClient, create: Any) -> None:
    """The session keeps them, for a client that takes over, and clips by what its commit brings."""
    session_id, stream = create(clip_grad_norm=0.25)
    checked(stream)
    assert stream.step(decision(clip_coefficient=1.0)).telemetry.clip_coefficient == 1.0
    config = raw.call("GetSession", pb.GetSessionRequest(session_id=session_id)).session.config
    assert (config.gradient.clip_grad_norm, config.gradient.two_phase) == (0.25, True)
