"""Ends that nobody asks for: with the owner, with the process, once, and in no finaliser."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from stepwire.lifetimes.endings import Endings
from tests.support.ends import Owner


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def endings(clock: Clock) -> Iterator[Endings]:
    endings = Endings(clock)
    yield endings
    endings.finish()


def test_an_end_is_made_in_a_thread_of_its_own_when_its_owner_is_collected(endings: Endings) -> None:
    made: list[str] = []
    done = threading.Event()

    def end(seconds: float) -> None:
        made.append(threading.current_thread().name)
        done.set()

    owner = Owner()
    endings.with_owner(owner, end)
    assert made == []
    del owner
    done.wait()
    assert made == ["stepwire-ends"]


def test_the_collector_may_run_under_a_lock_that_the_end_acquires(endings: Endings) -> None:
    """As where the collector runs in the middle of a step: an end in the finaliser would wait for its own thread."""
    lock, done = threading.Lock(), threading.Event()

    def end(seconds: float) -> None:
        with lock:
            done.set()

    class Cycle:
        pass

    owner: Any = Cycle()
    owner.itself = owner
    endings.with_owner(owner, end)
    del owner
    with lock:
        gc.collect()
        assert not done.is_set()
    done.wait()


@pytest.mark.parametrize("how", ["made", "cancelled"])
def test_an_end_is_made_once_or_never(endings: Endings, how: str) -> None:
    made: list[str] = []
    owner, other = Owner(), Owner()
    ending = endings.with_owner(owner, lambda seconds: made.append("end"))
    endings.with_owner(other, lambda seconds: made.append("other"))
    for _ in range(2):
        ending.make() if how == "made" else ending.cancel()
    del owner, other
    endings.finish()
    assert made == (["end", "other"] if how == "made" else ["other"])


def test_the_process_makes_the_ends_that_are_open_the_youngest_first_within_its_time(
    endings: Endings, clock: Clock
) -> None:
    made: list[tuple[str, float]] = []

    def end(name: str, seconds: float) -> None:
        made.append((name, seconds))
        clock.now += 3.0

    owners = [Owner() for _ in range(3)]
    for owner, name in zip(owners, ("client", "session", "step"), strict=True):
        endings.with_owner(owner, lambda seconds, name=name: end(name, seconds))
    assert not endings.is_over
    endings.finish(5.0)
    assert endings.is_over
    assert made == [("step", 5.0), ("session", 2.0), ("client", 0.0)]


def test_a_user_who_interrupts_the_end_of_the_process_does_not_wait(
    endings: Endings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, owner = threading.Event(), Owner()
    endings.with_owner(owner, lambda seconds: gate.wait())

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "join", interrupted)
        endings.finish()
    gate.set()


def test_an_end_that_fails_keeps_no_other_from_being_made(endings: Endings) -> None:
    made: list[str] = []

    def fail(seconds: float) -> None:
        raise RuntimeError("no")

    owners = [Owner(), Owner()]
    endings.with_owner(owners[0], lambda seconds: made.append("end"))
    endings.with_owner(owners[1], fail)
    endings.finish()
    assert made == ["end"]
