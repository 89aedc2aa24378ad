"""Steps that a session remembers, tells to a logger, and draws."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwire
import stepwire.aio
from stepwire import loggers
from stepwire.links import observed
from tests.support.lost_replies import lost_replies

START = {"a": np.full(4, 2.0, np.float32), "b": np.zeros((2, 3), np.float32)}
GROUPS = [{"params": ["b"], "lr": 0.5}]
SGD = {"optimizer": stepwire.SGD(lr=0.25), "groups": GROUPS, "non_finite": "skip"}


def gradient(size: float) -> dict[str, Any]:
    return {"a": np.full(4, size, np.float32), "b": np.zeros((2, 3), np.float32)}


def test_a_session_remembers_its_last_steps(client: stepwire.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed, "MOST_PAST_STEPS", 4)
    began = time.time()
    with client.create_session(START, **SGD) as session:
        assert session.history() == ()
        for size in (1.0, 2.0, float("nan"), 4.0, 8.0, 16.0):
            session.step(gradient(size))
        past = session.history()
        assert [each.step for each in past] == [3, 4, 5, 6]
        assert [each.result.skipped for each in past] == [True, False, False, False]
        assert [each.result.grad_norm for each in past[1:]] == [8.0, 16.0, 32.0]
        assert {each.learning_rates for each in past} == {(0.25, 0.5)}
        assert session.history(2) == past[2:] and session.history(0) == () and len(session.history(9)) == 4
        assert past[-1].result == session.last_result
        assert all(each.seconds >= each.result.queue_seconds + each.result.apply_seconds for each in past)
        ends = [each.end_time for each in past]
        assert ends == sorted(ends) and began <= ends[0] and ends[-1] <= time.time()
        for wrong in (-1, 1.5, True):
            with pytest.raises(stepwire.InvalidRequestError, match="^n: "):
                session.history(wrong)  # type: ignore[arg-type]


def test_a_step_that_is_repeated_is_remembered_once(target: str) -> None:
    told: list[int] = []
    with stepwire.connect(target, transport="tcp") as client:
        with client.create_session(START, logger=lambda step, _: told.append(step), **SGD) as session:
            session.step(gradient(1.0))
            with lost_replies(), pytest.raises(stepwire.DeadlineExceededError):
                session.step(gradient(2.0))
            assert len(session.history()) == 1
            session.step(gradient(2.0))
            assert [(each.step, each.result.replayed) for each in session.history()] == [(1, False), (2, True)]
            assert told == [1, 2]


def test_shards_and_asyncio_remember_and_tell_likewise(target: str) -> None:
    told: list[tuple[int, float]] = []
    large = {"w": np.zeros(160_000, np.float32)}

    async def train() -> None:
        async with stepwire.aio.connect([target, target], transport="tcp") as client:
            async with await client.create_session(large, optimizer=stepwire.SGD(lr=1.0)) as session:
                await session.log_to(lambda step, scalars: told.append((step, scalars["grad_norm"])))
                for size in (1.0, 2.0):
                    await session.step({"w": np.full(160_000, size, np.float32)})
                assert len(session.blocking.shards) == 2
                assert [each.result.grad_norm for each in await session.history()] == [400.0, 800.0]

    asyncio.run(train())
    assert told == [(1, 400.0), (2, 800.0)]


def test_a_logger_gets_the_scalars_of_each_step(client: stepwire.Client) -> None:
    told: list[tuple[int, dict[str, float]]] = []
    with client.create_session(START, logger=lambda *given: told.append(given), **SGD) as session:
        session.step_async(gradient(1.0)).result(120.0)
    ((step, scalars),) = told
    result = session.history()[0].result
    seconds = {name: getattr(result, name) for name in ("receive_seconds", "queue_seconds", "apply_seconds")}
    assert step == 1
    assert scalars == pytest.approx(
        {
            "grad_norm": 2.0,
            "clipped_grad_norm": 2.0,
            "clip_coefficient": 1.0,
            "non_finite_count": 0.0,
            "skipped": 0.0,
            "update_norm": 0.5,
            "param_norm": 3.5,
            "update_ratio": 0.5 / 3.5,
            "lr": 0.25,
            "group0/lr": 0.25,
            "group0/grad_norm": 2.0,
            "group0/update_norm": 0.5,
            "group0/param_norm": 3.5,
            "group1/lr": 0.5,
            "group1/grad_norm": 0.0,
            "group1/update_norm": 0.0,
            "group1/param_norm": 0.0,
            "step_seconds": session.history()[0].seconds,
            **seconds,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("problem", [RuntimeError("the disk is full"), SystemExit(1)])
def test_a_logger_that_fails_is_told_and_the_step_is_applied_once(
    client: stepwire.Client, caplog: pytest.LogCaptureFixture, problem: BaseException
) -> None:
    def logger(step: int, scalars: dict[str, float]) -> None:
        raise problem

    with client.create_session(START, logger=logger, **SGD) as session, caplog.at_level(logging.ERROR, "stepwire"):
        for expected in (1.75, 1.5):
            assert session.step(gradient(1.0))["a"].tolist() == [expected] * 4
        assert session.applied_step == 2
        assert [record.getMessage()[:26] for record in caplog.records] == [
            f"the logger failed at step {n}"[:26] for n in (1, 2)
        ]
        assert repr(problem) in repr(caplog.records[0].exc_info)
        session.log_to(None)
        session.step(gradient(1.0))
        assert len(caplog.records) == 2


def test_a_logger_cannot_use_the_session_but_may_look_back(
    client: stepwire.Client, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    def logger(step: int, scalars: dict[str, float]) -> None:
        seen.append((session.applied_step, session.history(1)[0].step))
        session.step(gradient(1.0))

    with client.create_session(START, logger=logger, **SGD) as session, caplog.at_level(logging.ERROR, "stepwire"):
        session.step(gradient(1.0))
        assert (seen, session.applied_step) == ([(1, 1)], 1)
        assert "logger: the function called the session" in str(caplog.records[0].exc_info[1])  # type: ignore[index]


class Writer:
    """Stands in for a writer of TensorBoard, and for a run of Weights & Biases."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        self.told.append((tag, value, global_step))

    def log(self, data: dict[str, float], commit: bool | None = None) -> None:
        self.told.append((data, commit))


@pytest.mark.parametrize(
    ("logger", "told"),
    [
        (lambda writer: loggers.tensorboard(writer, prefix="o/"), [("o/lr", 0.5, 7), ("o/grad_norm", 2.0, 7)]),
        (loggers.wandb, [({"optimizer/step": 7, "optimizer/lr": 0.5, "optimizer/grad_norm": 2.0}, None)]),
    ],
    ids=["tensorboard", "wandb"],
)
def test_writers_get_scalars_by_their_own_conventions(
    logger: Callable[[Writer], loggers.Logger], told: list[Any]
) -> None:
    writer = Writer()
    logger(writer)(7, {"lr": 0.5, "grad_norm": 2.0})
    assert writer.told == told


def test_a_logger_that_is_none_is_refused_before_anything_is_made(client: stepwire.Client) -> None:
    before = len(list(client.sessions()))
    with pytest.raises(stepwire.InvalidRequestError, match="^logger: .*stepwire.loggers"):
        client.create_session(START, logger=Writer(), **SGD)  # type: ignore[arg-type]
    assert len(list(client.sessions())) == before
    with pytest.raises(stepwire.InvalidRequestError, match="^writer: .*`add_scalar`"):
        loggers.tensorboard(print)
    with pytest.raises(stepwire.InvalidRequestError, match="^run: .*`log`"):
        loggers.wandb(None)


def test_a_training_is_drawn_as_it_was(client: stepwire.Client) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'stepwire[plots]'")
    from stepwire import plots

    with client.create_session(START, clip_grad_norm=3.0, **SGD) as session:
        with pytest.raises(stepwire.InvalidRequestError, match="^steps: "):
            plots.training(session)
        for size in (1.0, float("inf"), 4.0):
            session.step(gradient(size))
        figure = plots.training(session)
        norms, ratio, rates, times = figure.axes
        lines = {line.get_label(): line for line in norms.lines if len(line.get_xdata()) == 3}
        assert list(lines["before clipping"].get_xdata()) == [1, 2, 3]
        assert list(lines["before clipping"].get_ydata()) == [2.0, np.inf, 8.0]
        assert lines["after clipping"].get_ydata()[2] == pytest.approx(3.0)
        marks = [line.get_xdata()[0] for line in norms.lines if len(line.get_xdata()) == 2]
        assert marks == [2]
        drawn = [line.get_ydata() for line in rates.lines if len(line.get_xdata()) == 3]
        assert [list(values) for values in drawn] == [[0.25] * 3, [0.5] * 3]
        assert list(times.lines[0].get_ydata()) == [past.seconds for past in session.history()]
        assert ratio.lines[0].get_ydata()[1:2].tolist() != [0.0]
        assert plots.training(session.history(1)).axes[0].lines[0].get_xdata() == [3]
        for wrong in (client, [1.0], "steps"):
            with pytest.raises(stepwire.InvalidRequestError, match="^steps: .* is neither a session nor steps"):
                plots.training(wrong)  # type: ignore[arg-type]
