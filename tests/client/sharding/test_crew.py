"""Calls in parallel: all are waited for, and the cause is told rather than its consequences."""

from __future__ import annotations

import threading

import pytest

from stepwire.errors import DeadlineExceededError, StateChangedError, UnavailableError
from stepwire.sharding.ballot import Abandoned
from stepwire.sharding.crew import Crew


def raiser(failure: BaseException):
    def call() -> None:
        raise failure

    return call


def test_calls_run_side_by_side_and_return_in_order() -> None:
    crew, together = Crew(3), threading.Barrier(3)
    for _ in range(2):
        assert crew.each([lambda rank=rank: (together.wait(30.0), rank)[1] for rank in range(3)]) == [0, 1, 2]
        crew.close()
        crew.close()


def test_one_call_runs_where_it_is_made() -> None:
    assert Crew(1).each([threading.current_thread]) == [threading.current_thread()]


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
    crew, abandoned = Crew(3), []
    with pytest.raises(type(failures[told])) as raised:
        crew.each([raiser(failure) for failure in failures], lambda: abandoned.append(True))
    assert raised.value is failures[told]
    assert len(abandoned) == 3
    crew.close()


def test_who_waits_for_a_failed_one_is_let_go() -> None:
    crew, given_up = Crew(2), threading.Event()

    def waits() -> None:
        assert given_up.wait(30.0)

    with pytest.raises(KeyError):
        crew.each([waits, raiser(KeyError("x"))], given_up.set)
    crew.close()
