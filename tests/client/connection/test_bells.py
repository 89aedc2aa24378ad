"""Waits for changes of other threads, and interrupts of both sides."""

from __future__ import annotations

import threading

import pytest

from stepwire.connection.bells import Bells
from tests.support.interrupts import Arrival

PATIENCE_SECONDS = 120.0


def test_a_condition_that_holds_is_not_waited_for() -> None:
    assert Bells().wait_for(lambda: True)


def test_a_wait_ends_with_its_time() -> None:
    assert not Bells().wait_for(lambda: False, 0.0)


def test_every_waiter_looks_again_when_the_bells_ring() -> None:
    bells, looked, number = Bells(), threading.Barrier(4), [0]
    ended: list[bool] = []

    def wait() -> None:
        first = [True]

        def holds() -> bool:
            if first.pop() if first else False:
                looked.wait(PATIENCE_SECONDS)
            return number[0] == 2

        ended.append(bells.wait_for(holds))

    waiters = [threading.Thread(target=wait) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    looked.wait(PATIENCE_SECONDS)
    for _ in range(2):
        number[0] += 1
        bells.ring()
    for waiter in waiters:
        waiter.join(PATIENCE_SECONDS)
    assert ended == [True] * 3


def test_an_interrupt_leaves_nothing_that_other_threads_wait_for() -> None:
    counting, bells = Arrival(), Bells()
    with counting:
        bells.wait_for(lambda: True)
        bells.ring()
    for point in range(counting.points):
        with pytest.raises(KeyboardInterrupt), Arrival(point):
            bells.wait_for(lambda: True)
            bells.ring()
        other = threading.Thread(target=bells.wait_for, args=(lambda: True,))
        other.start()
        other.join(PATIENCE_SECONDS)
        assert not other.is_alive()
