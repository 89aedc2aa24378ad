"""One decision for all shards: its arithmetic, and who waits for whom."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.connection.retry import Deadline
from stepwire.errors import DeadlineExceededError, NonFiniteGradientError
from stepwire.optimizers.gradient_treatment import ClipFormula
from stepwire.optimizers.norms import clip_coefficient
from stepwire.sharding.coordinator import Abandoned, Bounds, Coordinator
from stepwire.v1 import step_pb2


def staged(*groups: float, bad: int = 0) -> step_pb2.GradientCheck:
    return step_pb2.GradientCheck(squared_norm=math.fsum(groups), non_finite_count=bad, group_squared_norms=groups)


def vote(coordinator: Coordinator, votes: list[step_pb2.GradientCheck]) -> list[step_pb2.StepCommit]:
    """Cast all votes, each in a thread."""
    deadline = Deadline(30.0)
    with ThreadPoolExecutor(len(votes)) as pool:
        return list(pool.map(lambda shard: coordinator.decide(shard, votes[shard], deadline), range(len(votes))))


def test_all_are_told_the_same() -> None:
    coordinator = Coordinator(4, 3, Bounds(2.5, (None, 1.0), "optax", "reject"))
    commits = vote(coordinator, [staged(9.0, 0.0), staged(0.0, 16.0), staged(0.0, 0.0)])
    left = math.hypot(3.0, 4.0 * 0.25)
    expected = step_pb2.StepCommit(clip_coefficient=2.5 / left, group_coefficients=[1.0, 0.25])
    assert commits == [expected] * 3
    assert coordinator.decision is not None
    assert (coordinator.decision.norms.groups, coordinator.decision.norms.total, coordinator.decision.norms.left) == (
        (3.0, 4.0),
        5.0,
        left,
    )


@given(
    st.lists(st.floats(0.0, 1e6), min_size=1, max_size=6), st.floats(1e-3, 1e3), st.sampled_from(get_args(ClipFormula))
)
def test_the_norm_is_that_of_the_whole_in_float32(squares: list[float], bound: float, formula: ClipFormula) -> None:
    coordinator = Coordinator(1, len(squares), Bounds(bound, (None,), formula, "reject"))
    commit = vote(coordinator, [staged(square) for square in squares])[0]
    norm = float(np.float32(math.sqrt(math.fsum(squares))))
    assert commit == step_pb2.StepCommit(clip_coefficient=clip_coefficient(norm, bound, formula))


def test_where_nothing_clips_the_factor_is_one() -> None:
    assert (
        vote(Coordinator(1, 2, Bounds(None, (None,), "torch", "skip")), [staged(1e9), staged(1e9)])
        == [step_pb2.StepCommit(clip_coefficient=1.0)] * 2
    )


def test_what_is_not_finite_is_skipped_by_all() -> None:
    votes = [staged(4.0), staged(math.inf, bad=2)]
    assert vote(Coordinator(1, 2, Bounds(1.0, (None,), "torch", "skip")), votes) == [step_pb2.StepCommit(skip=True)] * 2


def test_or_applied_by_all() -> None:
    commits = vote(Coordinator(1, 2, Bounds(1.0, (None,), "torch", "allow")), [staged(4.0), staged(math.inf, bad=2)])
    assert commits == [step_pb2.StepCommit(clip_coefficient=0.0)] * 2
    coordinator = Coordinator(1, 2, Bounds(1.0, (None,), "torch", "allow"))
    assert all(
        math.isnan(commit.clip_coefficient) for commit in vote(coordinator, [staged(4.0), staged(math.nan, bad=1)])
    )


def test_or_refused_for_all() -> None:
    coordinator = Coordinator(7, 2, Bounds(1.0, (None,), "torch", "reject"))
    causes = []
    with ThreadPoolExecutor(2) as pool:
        for each in [
            pool.submit(coordinator.decide, shard, staged(math.nan, bad=3), Deadline(30.0)) for shard in (0, 1)
        ]:
            failure = each.exception()
            assert isinstance(failure, Abandoned)
            causes.append(failure.cause)
    assert causes[0] is causes[1]
    assert isinstance(causes[0], NonFiniteGradientError)
    assert causes[0].metadata["non_finite_count"] == "6"
    assert coordinator.decision is None


def test_who_is_late_takes_the_others_along() -> None:
    coordinator = Coordinator(1, 2, Bounds(None, (None,), "torch", "reject"))
    out_of_time = Deadline(1.0, clock=iter([0.0, 2.0]).__next__)
    with pytest.raises(Abandoned) as late:
        coordinator.decide(0, staged(4.0), out_of_time)
    assert isinstance(late.value.cause, DeadlineExceededError)
    assert "shards [1] had not received their gradient within 1.0 s" in str(late.value.cause)
    with pytest.raises(Abandoned) as follows:
        coordinator.decide(1, staged(4.0), Deadline(30.0))
    assert follows.value.cause is late.value.cause
    assert coordinator.decision is None


def test_a_shard_that_comes_back_after_the_decision_finds_it_made() -> None:
    coordinator = Coordinator(1, 2, Bounds(1.0, (None,), "optax", "reject"))
    first = vote(coordinator, [staged(9.0), staged(16.0)])[0]
    coordinator.abandon()
    assert coordinator.decide(1, staged(1e6), Deadline(30.0)) == first


def test_nobody_waits_for_a_shard_that_failed() -> None:
    coordinator = Coordinator(1, 2, Bounds(None, (None,), "torch", "reject"))
    waiting = threading.Thread(target=coordinator.abandon)
    waiting.start()
    with pytest.raises(Abandoned) as given_up:
        coordinator.decide(0, staged(1.0), Deadline(30.0))
    waiting.join()
    assert given_up.value.cause is None
