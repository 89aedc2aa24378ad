"""Calls in parallel: all are waited for, and the cause is told rather than its consequences."""

from __future__ import annotations

import threading

import pytest

from stepwire.errors import DeadlineExceededError, StateChangedError, UnavailableError
from stepwire.sharding.coordinator import Abandoned
from stepwire.sharding.fan_out import fan_out


def raiser(failure: BaseException):
    def call() -> None:
        raise failure

    return call


def test_calls_run_side_by_side_and_return_in_order() -> None:
    together = threading.Barrier(3)
    for _ in range(2):
        assert fan_out([lambda rank=rank: (together.wait(120.0), rank)[1] for rank in range(3)]) == [0, 1, 2]
    assert fan_out([]) == []


def test_one_call_runs_where_it_is_made() -> None:
    assert fan_out([threading.current_thread]) == [threading.current_thread()]


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ([Abandoned(), UnavailableError("a"), StateChangedError("b")], 1),
        ([Abandoned(), DeadlineExceededError("a"), UnavailableError("b")], 2),
        ([Abandoned(), Abandoned(DeadlineExceededError("a")), Abandoned()], 1),
        ([Abandoned(DeadlineExceededError("a")), DeadlineExceededError("b"), Abandoned()], 1),
        ([KeyError("a"), KeyError("b"), Abandoned()], 0),
    ],
)
def test_the_cause_is_told(failures: list[BaseException], told: int) -> None:
    abandoned: list[bool] = []
    with pytest.raises(type(failures[told])) as raised:
        fan_out([raiser(failure) for failure in failures], lambda: abandoned.append(True))
    assert raised.value is failures[told]
    assert len(abandoned) == 3


def test_who_waits_for_a_failed_one_is_let_go() -> None:
    given_up = threading.Event()

    def waits() -> None:
        assert given_up.wait(120.0)

    with pytest.raises(KeyError):
        fan_out([waits, raiser(KeyError("x"))], given_up.set)
