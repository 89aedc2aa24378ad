"""The door that drains."""

from __future__ import annotations

import threading

import pytest

from stepwire.errors import Reason, UnavailableError
from stepwire_server.rpc.drain import Drain

PATIENCE_SECONDS = 30.0


def test_an_open_gate_lets_steps_pass_side_by_side() -> None:
    gate = Drain()
    with gate, gate:
        assert gate.wait_empty(0.0) is False
    assert (gate.wait_empty(0.0), gate.closed) == (True, False)


def test_a_closed_gate_refuses_and_says_when_to_come_back() -> None:
    gate = Drain(retry_after_seconds=2.5)
    gate.close()
    with pytest.raises(UnavailableError, match="shutting down") as refused, gate:
        raise AssertionError("inside")
    assert (refused.value.reason, refused.value.retry_after_seconds) == (Reason.SHUTTING_DOWN, 2.5)
    assert (gate.closed, gate.wait_empty(0.0)) == (True, True)


def test_who_is_inside_when_it_closes_may_finish() -> None:
    gate = Drain()
    with gate:
        gate.close()
        assert gate.wait_empty(0.0) is False
    assert gate.wait_empty(0.0) is True


def test_a_step_that_fails_has_left() -> None:
    gate = Drain()
    with pytest.raises(ZeroDivisionError), gate:
        raise ZeroDivisionError
    assert gate.wait_empty(0.0) is True


def test_who_waits_is_woken_by_the_last_to_leave() -> None:
    gate, leave, emptied = Drain(), threading.Event(), []

    def step(entered: threading.Event) -> None:
        with gate:
            entered.set()
            assert leave.wait(PATIENCE_SECONDS)

    entries = [threading.Event() for _ in range(3)]
    threads = [threading.Thread(target=step, args=(entered,)) for entered in entries]
    threads.append(threading.Thread(target=lambda: emptied.append(gate.wait_empty(PATIENCE_SECONDS))))
    for thread in threads[:3]:
        thread.start()
    for entered in entries:
        assert entered.wait(PATIENCE_SECONDS)
    threads[3].start()
    leave.set()
    for thread in threads:
        thread.join()
    assert emptied == [True]
