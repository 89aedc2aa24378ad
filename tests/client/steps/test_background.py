"""Steps in the background: in order, so many at a time, and none behind one that failed."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import Any

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.steps.background import BackgroundSteps


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


def test_steps_are_taken_in_order() -> None:
    queue, seen = BackgroundSteps(2), list[int]()
    futures = [queue.submit(lambda index=index: seen.append(index)) for index in range(20)]
    for future in futures:
        future.result(30)
    assert seen == list(range(20))
    queue.close()


def test_one_too_many_waits_for_room(gate: threading.Event) -> None:
    queue, handed_in = BackgroundSteps(2), threading.Event()
    first = queue.submit(lambda: gate.wait(30))
    second = queue.submit(lambda: "second")
    third: list[Any] = []

    def hand_in() -> None:
        third.append(queue.submit(lambda: "third"))
        handed_in.set()

    thread = threading.Thread(target=hand_in)
    thread.start()
    assert not handed_in.is_set()
    gate.set()
    assert handed_in.wait(30)
    thread.join()
    assert (first.result(30), second.result(30), third[0].result(30)) == (True, "second", "third")
    queue.close()


def test_a_failure_cancels_what_waits_and_nothing_later(gate: threading.Event) -> None:
    queue = BackgroundSteps(3)

    def fail() -> None:
        gate.wait(30)
        raise ValueError("broken")

    failing, behind = queue.submit(fail), queue.submit(lambda: 2)
    gate.set()
    with pytest.raises(ValueError, match="broken"):
        failing.result(30)
    with pytest.raises(CancelledError):
        behind.result(30)
    assert queue.submit(lambda: 3).result(30) == 3
    queue.close()


def test_closing_cancels_what_waits_and_lets_the_step_under_way_end(gate: threading.Event) -> None:
    queue, begun = BackgroundSteps(3), threading.Event()

    def step() -> str:
        begun.set()
        gate.wait(30)
        return "done"

    under_way, behind = queue.submit(step), queue.submit(lambda: None)
    assert begun.wait(30)
    queue.close()
    gate.set()
    assert under_way.result(30) == "done"
    assert behind.cancelled()
    queue.close()


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "2", None])
def test_a_limit_is_a_positive_integer(limit: Any) -> None:
    with pytest.raises(InvalidRequestError, match="steps_in_flight"):
        BackgroundSteps(limit)
