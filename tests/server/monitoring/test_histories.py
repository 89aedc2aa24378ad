"""Histories: bounded, whole, and right about when, where and by whom a run went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepwire.errors import FencedError, InvalidRequestError
from stepwire.optimizers import Hyperparameters
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.monitoring import histories
from stepwire_server.monitoring.histories import MOST_POINTS, Histories, History
from stepwire_server.monitoring.refusals import Refusals
from stepwire_server.records.committed import Committed
from stepwire_server.records.round_result import Contributor, RoundResult
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import GroupResult, StepResult, StepTimes
from tests.support.interleavings import Interleaving, Turnstile, every_interleaving

NAN = math.nan
AB = "ab" * 16
REQUEST = StepRequest(1, 1, FLOAT32, FLOAT32, True, 100, ())
TIMES = StepTimes(0.0, 0.0, 0.0)


def group(norm: float, lr: float = 0.1) -> GroupResult:
    return GroupResult(norm, Hyperparameters(lr=lr), 1)


def committed(
    step: int, norm: float = 1.0, *, parts: Any = (), worker: int = 0, session: str = AB, **fields: Any
) -> Committed:
    plain: dict[str, Any] = {"skipped": False, "groups": (group(norm),), "times": TIMES}
    numbers = {"step": step, "epoch": 1, "grad_norm": norm, "non_finite_count": 0 if math.isfinite(norm) else 3}
    result = StepResult(**plain | numbers | fields)
    return Committed(session, worker, 1, REQUEST, result, "tcp", parts)


def test_steps_of_one_second_are_one_point() -> None:
    history = History()
    history.add(committed(1, 2.0, update_norm=1.0, param_norm=10.0, loss_scale=512.0, clip_coefficient=0.5), 100.0)
    history.add(committed(2, 5.0, update_norm=3.0, param_norm=10.0), 100.9)
    history.add(committed(3, 1.0), 101.0)
    first, second = history.points
    assert (first.at, first.steps, first.last_step, first.norm, first.ratio) == (100.0, 2, 2, 5.0, 0.3)
    assert (first.clipped, first.bad, first.rates) == (1, 0, (0.1,))
    assert math.isnan(first.scale), "the last step had none"
    assert (second.at, second.steps, second.last_step) == (101.0, 1, 3)
    assert math.isnan(second.ratio)


def test_points_are_merged_when_they_are_too_many_and_no_step_is_lost() -> None:
    history, steps = History(), 5 * MOST_POINTS
    for step in range(1, steps + 1):
        history.add(committed(step, float(step), clip_coefficient=0.5 if step % 2 else 1.0), 1000.0 + step)
    assert len(history.points) <= MOST_POINTS
    assert history.seconds == 8.0
    assert sum(point.steps for point in history.points) == steps
    assert sum(point.clipped for point in history.points) == steps // 2
    assert [point.norm for point in history.points] == [point.last_step for point in history.points]
    assert history.points[-1].last_step == steps
    assert history.points[0].at == 1001.0


def test_a_point_with_nan_stays_one_when_it_is_merged() -> None:
    history = History()
    for step in range(1, 2 * MOST_POINTS):
        history.add(committed(step, NAN if step == 2 else 1.0), float(step))
    assert [point.bad for point in history.points].count(1) == 1
    assert [math.isnan(point.norm) for point in history.points].count(True) == 1


def test_nan_is_told_with_its_first_step_its_group_and_its_time() -> None:
    history = History()
    history.add(committed(1), 10.0)
    for step in (2, 3, 5):
        history.add(committed(step, NAN, groups=(group(1.0), group(NAN), group(math.inf)), skipped=True), 10.0 + step)
    history.add(committed(6), 20.0)
    history.add(committed(40, NAN), 60.0)
    first, second = history.troubles
    assert first._replace(norm=0.0) == ("nan", 12.0, 2, 5, 3, (1, 2), (0,), 0.0)
    assert (second.first_step, second.last_step, second.steps) == (40, 40, 1), "a new trouble, long after"


def test_the_worker_that_brought_nan_is_named() -> None:
    contributors = (Contributor(0, 1.0, 1.0, 0), Contributor(3, 1.0, NAN, 7))
    history = History()
    history.add(committed(1, NAN, round=RoundResult(1, contributors=contributors)), 0.0)
    assert history.troubles[0].workers == (3,)


def test_a_norm_far_beyond_the_usual_one_is_a_spike() -> None:
    history = History()
    for step in range(1, 31):
        history.add(committed(step, 2.0), float(step))
    assert not history.troubles
    history.add(committed(31, 19.0), 31.0)
    assert not history.troubles, "less than ten times the usual one"
    history.add(committed(32, 40.0, groups=(group(2.0), group(39.9))), 32.0)
    (trouble,) = history.troubles
    assert trouble == ("spike", 32.0, 32, 32, 1, (1,), (0,), 40.0)


def test_the_first_steps_are_no_spikes() -> None:
    history = History()
    for step, norm in enumerate((0.001, 5.0, 100.0), 1):
        history.add(committed(step, norm), float(step))
    assert not history.troubles


def test_the_straggler_is_behind_the_first_of_each_round() -> None:
    history = History()
    for step in range(1, 40):
        parts = ((0, RoundResult(step, waiting_seconds=3.0)), (1, RoundResult(step, waiting_seconds=0.5)))
        history.add(committed(step, parts=parts), float(step))
    assert history.lateness == pytest.approx({0: 0.0, 1: 2.5})


def test_histories_are_of_sessions_that_are_there() -> None:
    histories = Histories(lambda: 5.0)
    histories.committed(committed(1))
    found = histories.of("ab" * 16)
    assert found is not None
    assert found.points[0].at == 5.0
    histories.keep({"cd" * 16})
    assert histories.of("ab" * 16) is None


def test_refusals_that_repeat_are_one_line() -> None:
    now = iter((1.0, 2.0, 3.0))
    refusals = Refusals(lambda: next(now))
    for error in (FencedError("a"), FencedError("a"), InvalidRequestError("b" * 1000)):
        refusals.add(error)
    first, second = refusals.last()
    assert first == ("FENCED", "a", 1.0, 2.0, 2)
    assert (second.reason, second.text, second.times) == ("INVALID_CONFIG", "b" * 300, 1)


class Shared(dict[str, History]):
    """A dict with points in it at which another thread may go on."""

    def __init__(self, run: Interleaving) -> None:
        super().__init__()
        self.run = run

    def __iter__(self) -> Iterator[str]:
        found = super().__iter__()
        self.run.point()
        return found


def test_sessions_that_begin_side_by_side_where_there_are_many_have_their_histories(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(histories, "_MOST_SESSIONS", 2)
    made: list[Histories] = []

    def scene(run: Interleaving) -> dict[str, Callable[[], object]]:
        each = Histories(lambda: 0.0)
        each._histories, each._lock = Shared(run), Turnstile(run)  # type: ignore[assignment]
        made.append(each)

        def begin(number: int) -> None:
            each.committed(committed(1, session=f"{number:032x}"))

        run.unnamed(lambda: [begin(number) for number in range(2)])
        return {"third": lambda: begin(3), "fourth": lambda: begin(4), "sweep": lambda: each.keep({f"{3:032x}"})}

    assert every_interleaving(scene) == len(made) > 6
    for each in made:
        assert 1 <= len(each._histories) <= 2
