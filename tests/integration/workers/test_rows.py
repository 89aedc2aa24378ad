"""Rows of several workers: rounds of their exact sums, asynchronous steps, late workers, lost replies and restarts."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire import Rows
from tests.integration.durability.test_losses import Restarting
from tests.integration.workers.together import joined, together
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server

WORKERS, STEPS = 3, 4
ADAM = stepwire.Adam(lr=0.1)
TABLES = {"a": "torch_sparse", "b": "row_counter"}
SHAPES = {"a": (20, 3), "b": (900, 40), "w": (5,), "v": (7,)}
START: Any = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
GROUPS = [{"params": ["b", "v"], "lr": 0.05}]
"""So a dense tensor lies behind a table."""


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with numpy_server(max_chunk_bytes=64 << 10) as server:
        yield server.target


def options(**aggregation: Any) -> dict[str, Any]:
    together = stepwire.Aggregation(**{"workers": WORKERS} | aggregation)
    shared = {"optimizer": ADAM, "tables": TABLES, "groups": GROUPS}
    return {**shared, "aggregation": together, "request_id": uuid.uuid4().hex}


def drawn(worker: int, step: int) -> dict[str, Any]:
    """Draw gradients of a few bits, whose sums are exact; rows of the larger table take several messages."""
    rng = np.random.default_rng([worker, step])

    def values(*shape: int) -> Any:
        return (rng.integers(-99, 100, shape) / 8).astype(np.float32)

    return {
        "a": Rows(rng.integers(0, 9, 6), values(6, 3)),
        "b": Rows(rng.integers(0, 900, 600 if step % 2 else 3), values(600 if step % 2 else 3, 40)),
        "w": values(5),
        "v": values(7),
    }


def mean(gradients: list[dict[str, Any]], weights: list[float] | None = None) -> dict[str, Any]:
    """Return the mean of gradients, rounded once, as rows of which each comes once."""
    factors, found = weights or [1.0] * len(gradients), dict[str, Any]()
    for name, shape in SHAPES.items():
        total, came = np.zeros(shape), np.zeros(0, np.int64)
        for gradient, factor in zip(gradients, factors, strict=True):
            if name in TABLES:
                np.add.at(total, gradient[name].indices, gradient[name].values * float(factor))
                came = np.union1d(came, gradient[name].indices)
            else:
                total += gradient[name] * float(factor)
        whole = (total / sum(factors)).astype(np.float32)
        found[name] = Rows(came, whole[came]) if name in TABLES else whole
    return found


@contextlib.contextmanager
def alone(target: str, means: list[dict[str, Any]], **more: Any) -> Iterator[stepwire.Session]:
    """Yield the session of one worker that has made steps of some gradients."""
    with (
        stepwire.connect(target) as client,
        client.create_session(START, optimizer=ADAM, tables=TABLES, groups=GROUPS, **more) as session,
    ):
        for each in means:
            session.step(each)
        yield session


def state_of(session: stepwire.Session) -> list[Any]:
    state = session.state()
    slots = [(slot, name, values.tobytes()) for slot, named in state.slots.items() for name, values in named.items()]
    return [state.step, state.tensor_steps, *sorted(slots)]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_workers_step_as_one_that_is_fed_the_exact_mean_of_their_rows(target: str, clip: float | None) -> None:
    shared = options() | {"clip_grad_norm": clip}
    sessions = [joined(target, START, worker, **shared) for worker in range(WORKERS)]
    for step in range(STEPS):
        given = [drawn(worker, step) for worker in range(WORKERS)]
        calls = [functools.partial(each.step, own) for each, own in zip(sessions, given, strict=True)]
        replies: list[Any] = together(*calls)
        pulled: Any = sessions[0].pull()
        for reply, own in zip(replies, given, strict=True):
            assert [reply[name].tobytes() for name in "wv"] == [pulled[name].tobytes() for name in "wv"]
            for name in TABLES:
                came = np.unique(own[name].indices)
                assert reply[name].indices.tolist() == came.tolist()
                assert reply[name].values.tobytes() == pulled[name][came].tobytes()
    means = [mean([drawn(worker, step) for worker in range(WORKERS)]) for step in range(STEPS)]
    with alone(target, means, clip_grad_norm=clip) as one:
        assert state_of(sessions[1]) == state_of(one)
        assert one.last_result is not None and sessions[1].last_result is not None
        assert sessions[1].last_result.grad_norm == one.last_result.grad_norm


def test_no_order_and_no_division_of_the_rows_of_one_step_loses_a_digit(target: str) -> None:
    probe = np.array([1e8, 1.0, -1e8, 1.0], np.float32)[:, np.newaxis]
    for first in ([0, 1], [0, 3], [1, 3]):
        shared = options(workers=2, reduction="sum") | {"optimizer": stepwire.SGD(lr=1.0), "tables": {"t": "skipped"}}
        shared.pop("groups")
        sessions = [joined(target, {"t": np.zeros((3, 1), np.float32)}, worker, **shared) for worker in range(2)]
        parts = [first, [place for place in range(4) if place not in first]]
        together(
            *(
                functools.partial(each.step, {"t": Rows([1, 1], probe[part])})
                for each, part in zip(sessions, parts, strict=True)
            )
        )
        assert sessions[0].pull()["t"].tolist() == [[0], [-2], [0]]  # type: ignore[call-overload]


def test_weights_are_those_of_the_steps(target: str) -> None:
    weights, shared = [1.0, 24.0, 7.0], options(reduction="weighted_mean")
    sessions = [joined(target, START, worker, **shared) for worker in range(WORKERS)]
    given = [drawn(worker, 0) for worker in range(WORKERS)]
    together(*(functools.partial(sessions[own].step, given[own], weight=weights[own]) for own in range(WORKERS)))
    with alone(target, [mean(given, weights)]) as one:
        assert state_of(sessions[0]) == state_of(one)


def test_a_table_that_some_workers_leave_out_has_the_rows_of_the_others(target: str) -> None:
    shared = options(workers=2, reduction="sum") | {"missing_gradient": "keep"}
    sessions = [joined(target, START, worker, **shared) for worker in range(2)]
    own = drawn(0, 0)
    first, second = together(
        functools.partial(sessions[0].step, own), functools.partial(sessions[1].step, {"w": np.ones(5, np.float32)})
    )
    assert second["a"] is None and first["a"].indices.tolist() == np.unique(own["a"].indices).tolist()  # type: ignore[call-overload]
    together(*(functools.partial(each.step, {"w": np.ones(5, np.float32)}) for each in sessions))
    assert sessions[0].state().tensor_steps == {"a": 1, "b": 1, "w": 2, "v": 1}


def test_a_late_worker_gets_the_rows_that_it_named_and_a_lost_reply_comes_again(target: str) -> None:
    shared = options(required_workers=2, most_grace=0.0, least_grace=0.0)
    sessions = [joined(target, START, worker, **shared) for worker in range(WORKERS)]
    for session in sessions:
        session.attach()
    given = [drawn(worker, 0) for worker in range(WORKERS)]
    with lost_replies(of=lambda hold: hold.worker == 1):
        calls = [functools.partial(own.step, gradient) for own, gradient in zip(sessions[:2], given, strict=False)]
        with pytest.raises(stepwire.DeadlineExceededError):
            together(*calls)
    late: Any = sessions[2].step(given[2])
    again: Any = sessions[1].step(given[1])
    assert sessions[2].last_result is not None and sessions[2].last_result.round is not None
    assert sessions[2].last_result.round.dropped and sessions[0].info().applied_step == 1
    pulled: Any = sessions[0].pull()
    for reply, own in ((late, given[2]), (again, given[1])):
        assert reply["b"].values.tobytes() == pulled["b"][np.unique(own["b"].indices)].tobytes()
    with alone(target, [mean(given[:2])]) as one:
        assert state_of(sessions[0]) == state_of(one)


@pytest.mark.parametrize("lag", [None, 1])
def test_asynchronous_rows_are_steps_as_they_come(target: str, lag: int | None) -> None:
    shared = options(workers=2, mode="async", staleness_correction=True, max_staleness_steps=lag)
    sessions: list[Any] = [joined(target, START, worker, **shared) for worker in range(2)]
    with alone(target, []) as one:
        for step, (worker, stale) in enumerate([(0, 0), (1, 1), (1, 0), (0, 2)]):
            gradient = drawn(worker, step)
            if step == 2:
                with lost_replies(), pytest.raises(stepwire.DeadlineExceededError):
                    sessions[worker].step(gradient)
            found = sessions[worker].step(gradient)
            is_late = lag is not None and stale > lag
            assert sessions[worker].last_result.round.dropped == is_late
            if not is_late:
                factor = 1.0 / (1.0 + stale)
                one.step(gradient, hyperparameters=[{"lr": 0.1 * factor}, {"lr": 0.05 * factor}])
            pulled: Any = one.pull()
            assert found["b"].values.tobytes() == pulled["b"][np.unique(gradient["b"].indices)].tobytes()
        assert state_of(sessions[0]) == state_of(one)


def test_a_row_that_is_not_finite_is_told_to_its_worker_alone(target: str) -> None:
    shared = options(workers=2)
    sessions = [joined(target, START, worker, **shared) for worker in range(2)]
    bad, good = drawn(0, 0), [drawn(worker, 0) for worker in range(2)]
    bad["a"] = Rows([3], np.full((1, 3), np.nan, np.float32))

    def first() -> Any:
        with pytest.raises(stepwire.NonFiniteGradientError, match="'a'"):
            sessions[0].step(bad)
        return sessions[0].step(good[0])

    together(first, functools.partial(sessions[1].step, good[1]))
    with alone(target, [mean(good)]) as one:
        assert state_of(sessions[0]) == state_of(one)


@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_rows_of_workers_survive_a_restart(tmp_path: pathlib.Path, durability: str, mode: str) -> None:
    """Also a second one, from a checkpoint with the numbers of rows; asynchronous workers take turns."""
    with contextlib.ExitStack() as stack:
        restarting = Restarting(tmp_path, stack)
        shared = options(mode=mode, workers=2) | {"durability": durability}
        retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
        clients = [stack.enter_context(stepwire.connect(restarting.target, timeout=120.0, retry=retry)) for _ in "ab"]
        sessions = [each.create_session(START, worker=worker, **shared) for worker, each in enumerate(clients)]
        given = [[drawn(worker, step) for worker in range(2)] for step in range(4)]
        for step, gradients in enumerate(given):
            calls = [functools.partial(each.step, own) for each, own in zip(sessions, gradients, strict=True)]
            _ = together(*calls) if mode == "sync" else [call() for call in calls]
            if step in (1, 2):
                if durability == "checkpoint":
                    sessions[0].save_checkpoint(f"step-{step}")
                restarting.crash(restarting.image())
        means = [mean(each) for each in given] if mode == "sync" else [own for each in given for own in each]
        with alone(restarting.target, means) as one:
            assert state_of(sessions[0]) == state_of(one)


def test_rows_are_pulled_as_of_one_moment(target: str) -> None:
    session: Any = joined(target, START, 0, **options(workers=1))
    session.step(drawn(0, 1))
    whole: Any = session.pull()
    rows = np.arange(900)[::-1]
    pulled = session.pull(rows={"b": rows, "a": []})
    assert pulled["b"].values.tobytes() == whole["b"][rows].tobytes() and len(pulled["a"].values) == 0
    with pytest.raises(stepwire.InvalidRequestError, match="row 20 is not"):
        session.pull(rows={"a": [20]})


def test_the_memory_of_a_round_is_that_of_its_rows_and_is_given_back() -> None:
    """Two workers' rows take about 0.5 MB each: twelve rounds of a leak would not fit, nor do ten times as many."""
    with numpy_server(memory_budget=4 << 20) as server:
        shared = options(workers=2)
        sessions = [joined(server.target, START, worker, **shared) for worker in range(2)]
        for step in range(12):
            given = [drawn(worker, 2 * step + 1) for worker in range(2)]
            together(*(functools.partial(each.step, own) for each, own in zip(sessions, given, strict=True)))
        many = drawn(0, 1) | {"b": Rows(np.zeros(6000, np.int64), np.ones((6000, 40), np.float32))}
        with pytest.raises(stepwire.ResourceExhaustedError):
            sessions[0].step(many)
        together(*(functools.partial(each.step, drawn(worker, 0)) for worker, each in enumerate(sessions)))
        assert sessions[0].info().applied_step == 13
