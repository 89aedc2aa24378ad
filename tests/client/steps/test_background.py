"""Steps in the background: in order, so many at a time, and none behind one that failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import pytest

from stepwire.errors import InvalidRequestError
from stepwire.steps.background import BackgroundSteps


class Waiting:
    """Steps that are handed in while there is no vacancy.

    Attributes:
        waited: set once a caller waits for a vacancy.
        futures: what the callers got.
    """

    def __init__(self, queue: BackgroundSteps) -> None:
        """Watch the callers of a queue."""
        self.waited = threading.Event()
        self.futures: list[Future[Any]] = []
        self._wait_for = queue._changed.wait_for
        queue._changed.wait_for = self._watched  # type: ignore[method-assign]

    def _watched(self, vacant: Callable[[], bool], timeout: float | None = None) -> bool:
        if not vacant():
            self.waited.set()
        return self._wait_for(vacant, timeout)


@pytest.fixture
def gate() -> threading.Event:
    return threading.Event()


def test_steps_are_taken_in_order() -> None:
    queue, seen = BackgroundSteps(2), list[int]()
    futures = [queue.submit(lambda index=index: seen.append(index)) for index in range(20)]
    for future in futures:
        future.result(120.0)
    assert seen == list(range(20))
    queue.close()


def test_one_too_many_waits_for_room(gate: threading.Event) -> None:
    queue, handed_in = BackgroundSteps(2), threading.Event()
    first = queue.submit(lambda: gate.wait(120.0))
    second = queue.submit(lambda: "second")
    third: list[Any] = []

    def hand_in() -> None:
        third.append(queue.submit(lambda: "third"))
        handed_in.set()

    thread = threading.Thread(target=hand_in)
    thread.start()
    assert not handed_in.is_set()
    gate.set()
    assert handed_in.wait(120.0)
    thread.join()
    assert (first.result(120.0), second.result(120.0), third[0].result(120.0)) == (True, "second", "third")
    queue.close()


def test_a_failure_cancels_what_waits_and_nothing_later(gate: threading.Event) -> None:
    queue = BackgroundSteps(3)

    def fail() -> None:
        gate.wait(120.0)
        raise ValueError("broken")

    failing, behind = queue.submit(fail), queue.submit(lambda: 2)
    gate.set()
    with pytest.raises(ValueError, match="broken"):
        failing.result(120.0)
    with pytest.raises(CancelledError):
        behind.result(120.0)
    assert queue.submit(lambda: 3).result(120.0) == 3
    queue.close()


def test_closing_cancels_what_waits_and_lets_the_step_under_way_end(gate: threading.Event) -> None:
    queue, begun = BackgroundSteps(3), threading.Event()

    def step() -> str:
        begun.set()
        gate.wait(120.0)
        return "done"

    under_way, behind = queue.submit(step), queue.submit(lambda: None)
    assert begun.wait(120.0)
    queue.close()
    gate.set()
    assert under_way.result(120.0) == "done"
    assert behind.cancelled()
    queue.close()


def test_a_step_that_waits_for_a_vacancy_is_behind_the_step_that_fails(gate: threading.Event) -> None:
    """Its caller cannot have known. The step neither overtakes the cancelled ones nor replaces the failed one."""
    queue, applied = BackgroundSteps(2), list[str]()
    waits = Waiting(queue)

    def fail() -> None:
        waits.waited.wait(120.0)
        raise ValueError("broken")

    failing, behind = queue.submit(fail), queue.submit(lambda: applied.append("second"))
    thread = threading.Thread(target=lambda: waits.futures.append(queue.submit(lambda: applied.append("third"))))
    thread.start()
    thread.join(120.0)
    for future in (behind, *waits.futures):
        with pytest.raises(CancelledError):
            future.result(120.0)
    with pytest.raises(ValueError, match="broken"):
        failing.result(120.0)
    assert (len(waits.futures), applied, queue.statistics().failed) == (1, [], 1)
    queue.close()


def test_a_step_is_behind_a_failure_until_its_caller_has_read_it() -> None:
    queue, over = BackgroundSteps(2), threading.Event()

    def fail() -> None:
        raise ValueError("broken")

    failing = queue.submit(fail)
    failing.add_done_callback(lambda future: over.set())
    assert over.wait(120.0)
    unaware = [queue.submit(lambda: 1) for _ in range(3)]
    assert wait([failing, *unaware], 30).not_done == set()
    assert all(future.cancelled() for future in unaware)
    assert isinstance(failing.exception(30), ValueError)
    assert queue.submit(lambda: 2).result(120.0) == 2
    queue.close()


def test_a_cancelled_step_tells_of_the_failure_too(gate: threading.Event) -> None:
    queue = BackgroundSteps(2)

    def fail() -> None:
        gate.wait(120.0)
        raise ValueError("broken")

    queue.submit(fail)
    behind = queue.submit(lambda: 1)
    gate.set()
    with pytest.raises(CancelledError):
        behind.exception(30)
    assert queue.submit(lambda: 2).result(120.0) == 2
    queue.close()


def test_waiting_in_vain_for_a_step_reads_nothing(gate: threading.Event) -> None:
    queue, over = BackgroundSteps(1), threading.Event()

    def fail() -> None:
        gate.wait(120.0)
        raise ValueError("broken")

    failing = queue.submit(fail)
    failing.add_done_callback(lambda future: over.set())
    with pytest.raises(TimeoutError):
        failing.exception(0.0)
    gate.set()
    assert over.wait(120.0)
    assert queue.submit(lambda: 1).cancelled()
    queue.close()


def test_closing_cancels_a_step_that_waits_for_a_vacancy(gate: threading.Event) -> None:
    queue = BackgroundSteps(1)
    waits = Waiting(queue)
    under_way = queue.submit(lambda: gate.wait(120.0))
    thread = threading.Thread(target=lambda: waits.futures.append(queue.submit(lambda: None)))
    thread.start()
    assert waits.waited.wait(120.0)
    queue.close()
    thread.join(120.0)
    assert waits.futures[0].cancelled()
    assert queue.submit(lambda: None).cancelled()
    gate.set()
    assert under_way.result(120.0)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "2", None])
def test_a_limit_is_a_positive_integer(limit: Any) -> None:
    with pytest.raises(InvalidRequestError, match="steps_in_flight"):
        BackgroundSteps(limit)
