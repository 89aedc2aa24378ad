"""Rounds of several workers over real servers: one step of the exact mean, whoever comes when."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.testing import serving
from tests.integration.workers.together import exact_mean, gradients, joined, together

ZEROS = {"w": np.zeros(300, np.float32)}
ADAM = stepwire.AdamW(lr=0.1)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with serving() as running:
        yield running


def options(**aggregation: Any) -> dict[str, Any]:
    return {
        "optimizer": ADAM,
        "aggregation": stepwire.Aggregation(**aggregation),
        "request_id": uuid.uuid4().hex,
    }


def alone(target: str, means: list[dict[str, np.ndarray[Any, Any]]], **kwargs: Any) -> list[np.ndarray[Any, Any]]:
    """Step one worker by gradients that are means, and return the parameters after each."""
    with stepwire.connect(target) as client, client.create_session(ZEROS, optimizer=ADAM, **kwargs) as session:
        return [session.step(mean)["w"] for mean in means]  # type: ignore[index,call-overload,misc]


@pytest.mark.parametrize("transport", ["tcp", "uds", "shm"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_workers_step_as_one_worker_that_is_fed_the_exact_mean(target: str, transport: str, clip: float | None) -> None:
    given = gradients(3, 4)
    means = [exact_mean([worker[step] for worker in given]) for step in range(4)]
    shared = options(workers=3) | {"clip_grad_norm": clip}

    def work(worker: int) -> list[np.ndarray[Any, Any]]:
        with stepwire.connect(target, transport=transport) as client:
            session = client.create_session(ZEROS, worker=worker, **shared)
            found = [session.step(gradient)["w"].copy() for gradient in given[worker]]  # type: ignore[index,call-overload,union-attr]
            assert session.transport is not None
            assert session.transport.name == transport
            result = session.last_result
            assert result is not None
            assert result.round is not None
            assert [each.worker for each in result.round.contributors] == [0, 1, 2]
            assert (result.step, result.round.contribution, result.round.dropped) == (4, 4, False)
            return found

    expected = alone(target, means, clip_grad_norm=clip)
    for found in together(*(functools.partial(work, worker) for worker in range(3))):
        assert [values.tobytes() for values in found] == [values.tobytes() for values in expected]


def test_weights_are_those_of_the_steps(target: str) -> None:
    given, weights = gradients(3, 1), [1.0, 24.0, 7.0]
    shared = options(workers=3, reduction="weighted_mean")
    sessions = [joined(target, ZEROS, worker, **shared) for worker in range(3)]
    found = together(
        *(
            functools.partial(session.step, given[worker][0], weight=weights[worker])
            for worker, session in enumerate(sessions)
        )
    )
    expected = alone(target, [exact_mean([each[0] for each in given], weights)])[0]
    assert [each["w"].tobytes() for each in found] == [expected.tobytes()] * 3  # type: ignore[index,call-overload]


def test_a_worker_that_comes_too_late_gets_an_answer_and_the_present_parameters(target: str) -> None:
    given = gradients(3, 2)
    shared = options(workers=3, required_workers=2, most_grace=0.0, least_grace=0.0)
    sessions = [joined(target, ZEROS, worker, **shared) for worker in range(3)]
    for session in sessions:
        session.attach()
    first, second = together(
        functools.partial(sessions[0].step, given[0][0]), functools.partial(sessions[1].step, given[1][0])
    )
    late = sessions[2].step(given[2][0])
    result = sessions[2].last_result
    assert result is not None
    assert result.round is not None
    assert (result.step, result.round.dropped, result.round.staleness) == (1, True, 1)
    assert first["w"].tobytes() == second["w"].tobytes() == late["w"].tobytes()  # type: ignore[index,call-overload]
    found = together(*(functools.partial(sessions[worker].step, given[worker][1]) for worker in (0, 2)))
    means = [exact_mean([given[0][0], given[1][0]]), exact_mean([given[0][1], given[2][1]])]
    expected = alone(target, means)[1]
    assert [each["w"].tobytes() for each in found] == [expected.tobytes()] * 2  # type: ignore[index,call-overload]


def test_too_few_workers_are_told_which_ones_are_missing_and_nothing_is_applied(target: str) -> None:
    given = gradients(2, 1)
    shared = options(workers=3, round_timeout=0.05)
    sessions = [joined(target, ZEROS, worker, **shared) for worker in range(3)]
    with pytest.raises(stepwire.NotEnoughWorkersError, match="1 of 3 workers") as caught:
        sessions[1].step(given[1][0])
    assert caught.value.metadata["missing_workers"] == "0,2"
    assert sessions[1].info().applied_step == 0


def test_any_worker_is_the_lowest_that_was_never_there(target: str) -> None:
    shared = options(workers=3)
    sessions = [joined(target, ZEROS, "any", **shared) for _ in range(3)]
    for session in sessions:
        session.attach()
    assert [session.worker for session in sessions] == [0, 1, 2]
    assert [(each.worker, each.attached) for each in sessions[0].info().members] == [(0, True), (1, True), (2, True)]
    later = stepwire.Retry(uniform=lambda low, high: 1e9)  # the next attempt would come after the deadline
    with stepwire.connect(target, retry=later) as client:
        session = client.create_session(ZEROS, worker="any", **shared)
        with pytest.raises(stepwire.ResourceExhaustedError, match="all 3 workers"):
            session.attach()


def test_a_load_ends_the_open_round(target: str) -> None:
    given = gradients(2, 1)
    sessions = [joined(target, ZEROS, worker, **options_) for options_ in [options(workers=2)] for worker in range(2)]
    sessions[0].attach()
    waiting = sessions[0].step_async(given[0][0], timeout=20.0)
    while not any(member.attached for member in sessions[1].info().members):
        pass
    sessions[1].load({"w": np.ones(300, np.float32)})
    # The contribution may have come before the load or after it: both are of a state that is no more.
    with pytest.raises(stepwire.StepwireError, match="load"):
        waiting.result(20.0)
    sessions[0].pull()
    found = together(*(functools.partial(session.step, given[index][0]) for index, session in enumerate(sessions)))
    assert found[0]["w"].tobytes() == found[1]["w"].tobytes()  # type: ignore[index,call-overload]
    assert sessions[0].applied_step == 1


def test_a_worker_goes_on_after_a_load_of_another_one_that_it_has_pulled(target: str) -> None:
    shared = options(workers=2, mode="async") | {"optimizer": stepwire.SGD(lr=1.0)}
    first, second = (joined(target, ZEROS, worker, **shared) for worker in range(2))
    first.step(ZEROS)
    second.step(ZEROS)
    first.load({"w": np.ones(300, np.float32)})
    second.pull()  # no stream broke, so no attach told of the load
    np.testing.assert_array_equal(second.step(ZEROS)["w"], np.ones(300, np.float32))  # type: ignore[index,call-overload]
    first.load(ZEROS)
    with pytest.raises(stepwire.StepMismatchError, match="another worker loaded it; pull the parameters"):
        second.step(ZEROS)


def test_asynchronous_steps_tell_their_staleness_and_correct_for_it(target: str) -> None:
    given = gradients(2, 2)
    shared = options(workers=2, mode="async", staleness_correction=True, max_staleness_steps=1) | {
        "optimizer": stepwire.SGD(lr=1.0)
    }
    first, second = (joined(target, ZEROS, worker, **shared) for worker in range(2))
    one = first.step(given[0][0])["w"]  # type: ignore[index,call-overload]
    np.testing.assert_array_equal(one, -given[0][0]["w"])
    two = second.step(given[1][0])["w"]  # type: ignore[index,call-overload]
    np.testing.assert_array_equal(two, one - np.float32(0.5) * given[1][0]["w"])
    result = second.last_result
    assert result is not None
    assert result.round is not None
    assert (result.step, result.round.staleness, result.round.contribution) == (2, 1, 1)
    second.step(given[1][1])
    stale = first.step(given[0][1])["w"]  # type: ignore[index,call-overload]
    result = first.last_result
    assert result is not None
    assert result.round is not None
    assert (result.step, result.round.staleness, result.round.dropped) == (3, 2, True)
    np.testing.assert_array_equal(stale, second.pull()["w"])  # type: ignore[index,call-overload]


@pytest.mark.parametrize("reduction", ["median", "trimmed_mean", "norm_bounded_mean"])
def test_a_bad_worker_moves_robust_reductions_little(target: str, reduction: str) -> None:
    given = gradients(3, 1)
    given[1][0]["w"] = given[1][0]["w"] * np.float32(1e6)
    extra = {"trimmed": 1} if reduction == "trimmed_mean" else {}
    shared = options(workers=3, reduction=reduction, **extra) | {"optimizer": stepwire.SGD(lr=1.0)}
    sessions = [joined(target, ZEROS, worker, **shared) for worker in range(3)]
    found = together(*(functools.partial(session.step, given[index][0]) for index, session in enumerate(sessions)))
    rows = np.stack([each[0]["w"] for each in given])
    moved = -found[0]["w"]  # type: ignore[index,call-overload]
    if reduction == "norm_bounded_mean":
        assert np.linalg.norm(moved) < 2 * np.linalg.norm(rows[0])
    else:
        np.testing.assert_array_equal(moved, np.median(rows, axis=0))
