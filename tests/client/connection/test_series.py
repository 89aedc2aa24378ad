"""Calls in the order in which they were added, and no thread without a call."""

from __future__ import annotations

import threading

from stepwire.connection.series import Series

PATIENCE_SECONDS = 120.0


def test_calls_are_made_in_order_and_one_at_a_time() -> None:
    series, seen, ended = Series(), list[int](), threading.Event()
    going_on = threading.Semaphore(1)

    def call(number: int) -> None:
        assert going_on.acquire(blocking=False)
        seen.append(number)
        going_on.release()

    for number in range(100):
        series.add(lambda number=number: call(number))
    series.add(ended.set)
    assert ended.wait(PATIENCE_SECONDS)
    assert seen == list(range(100))


def test_a_call_may_add_another() -> None:
    series, ended = Series(), threading.Event()
    series.add(lambda: series.add(ended.set))
    assert ended.wait(PATIENCE_SECONDS)
