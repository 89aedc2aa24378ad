"""The deadline of a stream's next message. The clock is the test's; threads are waited for, never slept on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from stepwire.connection.watchdog import Watchdog

LONG_SECONDS = 3600.0
PATIENCE_SECONDS = 120.0


class Kennel:
    """A watchdog on a clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.bark = threading.Event()
        self.barks = 0
        self.dog = Watchdog(self._heard, lambda: self.now)

    def _heard(self) -> None:
        self.barks += 1
        self.bark.set()

    def threads(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "stepwire-watchdog"]


@pytest.fixture
def kennel() -> Iterator[Kennel]:
    kennel = Kennel()
    yield kennel
    kennel.dog.close()
    for thread in kennel.threads():
        thread.join(PATIENCE_SECONDS)


def test_nothing_runs_before_the_first_deadline(kennel: Kennel) -> None:
    assert kennel.threads() == []
    assert not kennel.dog.barked


def test_it_barks_once_when_the_deadline_passes(kennel: Kennel) -> None:
    kennel.dog.arm(0.0)
    assert kennel.bark.wait(PATIENCE_SECONDS)
    for thread in kennel.threads():
        thread.join(PATIENCE_SECONDS)
    assert (kennel.dog.barked, kennel.barks) == (True, 1)


def test_a_nearer_deadline_wakes_it(kennel: Kennel) -> None:
    """It sleeps towards the farther one in real time, which does not pass here."""
    kennel.dog.arm(LONG_SECONDS)
    kennel.now = 10.0
    kennel.dog.arm(0.0)
    assert kennel.bark.wait(PATIENCE_SECONDS)


def test_a_deadline_that_never_comes_is_waited_for_like_others(kennel: Kennel) -> None:
    kennel.dog.arm(float("inf"))
    kennel.dog.arm(0.0)
    assert kennel.bark.wait(PATIENCE_SECONDS)


def test_disarmed_in_time_it_does_not_bark(kennel: Kennel) -> None:
    kennel.dog.arm(LONG_SECONDS)
    kennel.dog.disarm()
    kennel.now = 2 * LONG_SECONDS
    kennel.dog.close()
    for thread in kennel.threads():
        thread.join(PATIENCE_SECONDS)
    assert (kennel.threads(), kennel.dog.barked, kennel.barks) == ([], False, 0)


def test_a_later_deadline_replaces_an_earlier_one(kennel: Kennel) -> None:
    """Woken for the first deadline, it sees the second and sleeps on: the usual course of a stream of steps."""
    kennel.dog.arm(100.0)
    kennel.now = 99.0
    kennel.dog.arm(100.0)
    kennel.now = 150.0
    kennel.dog.close()
    for thread in kennel.threads():
        thread.join(PATIENCE_SECONDS)
    assert kennel.barks == 0


def test_many_deadlines_take_one_thread(kennel: Kennel) -> None:
    for _ in range(50):
        kennel.dog.arm(LONG_SECONDS)
        kennel.dog.disarm()
    assert len(kennel.threads()) == 1


def test_without_a_deadline_its_thread_ends_until_the_next_one(kennel: Kennel) -> None:
    dog = Watchdog(kennel.bark.set, look_seconds=0.0)
    with dog._lock:  # which the thread takes to look
        dog.arm(LONG_SECONDS)
        dog.disarm()
        (thread,) = kennel.threads()
    thread.join(PATIENCE_SECONDS)
    assert (kennel.threads(), dog.barked) == ([], False)
    dog.arm(0.0)
    assert kennel.bark.wait(PATIENCE_SECONDS)


def test_closing_twice_is_harmless(kennel: Kennel) -> None:
    kennel.dog.arm(LONG_SECONDS)
    kennel.dog.close()
    kennel.dog.close()
    for thread in kennel.threads():
        thread.join(PATIENCE_SECONDS)
    assert (kennel.threads(), kennel.barks) == ([], 0)


def test_closed_before_any_deadline_it_stays_quiet(kennel: Kennel) -> None:
    kennel.dog.close()
    kennel.dog.arm(0.0)
    for thread in kennel.threads():
        thread.join(PATIENCE_SECONDS)
    assert (kennel.dog.barked, kennel.barks) == (False, 0)
