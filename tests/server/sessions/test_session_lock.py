"""The lock of a session and the word of a compiled lane: every interleaving of the loop, lockers and readers.

The code is the product's. Only the word, the locks and the socket are the test's, so that each change of what threads
share is a point at which another one may go on. `STEPWIRE_LONG_TESTS=1` has the scenes with thousands of orders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stepwire_server.engines.cpu import lane_loop
from stepwire_server.engines.cpu import lane_words as word
from stepwire_server.engines.cpu.lane_loop import Seat
from stepwire_server.sessions.session_lock import SessionLock
from tests.support.interleavings import Interleaving, Turnstile, every_interleaving

lane = pytest.importorskip("stepwire_server.engines.cpu.numba_lane_functions")


class Words:
    """The words of one lane. An exchange and a store are points.

    Whoever has found a step under way looks again when the word has changed: to look before that is no other run.
    """

    def __init__(self, run: Interleaving) -> None:
        self.run = run
        self.row = np.zeros(word.WIDTH, np.int64)
        self._found_busy = False

    def exchange(self, address: int, expected: int, value: int) -> bool:
        spins = self._found_busy and value == word.OVER
        self.run.point((lambda: bool(self.row[word.WORD] != word.BUSY)) if spins else (lambda: True))
        if self.row[word.WORD] != expected:
            self._found_busy |= value == word.OVER
            return False
        self.row[word.WORD] = value
        return True

    def publish(self, address: int, value: int) -> None:
        self.run.point()
        self.row[word.WORD] = value


class Scene:
    """A session with one lane, whose loop and thread are those of the product.

    Attributes:
        told: the steps that the session was told of, in their order.
        bells: the times that the bell was rung.
    """

    def __init__(self, run: Interleaving, patch: pytest.MonkeyPatch, datagrams: list[str]) -> None:
        self.run, self.words, self.datagrams = run, Words(run), datagrams
        self.lock = SessionLock()
        self.lock._lock, self.lock._settling = Turnstile(run), Turnstile(run)  # type: ignore[assignment]
        self.inside: list[str] = []
        self.applied, self.told, self.bells = 0, [0], 0
        self.in_hand: list[str] = []
        self.seat = object.__new__(Seat)
        self.seat.row, self.seat._address, self.seat._bell = self.words.row, 0, 0
        self.seat._loop = self.words  # type: ignore[assignment]
        self._patch(patch)

    def _patch(self, patch: pytest.MonkeyPatch) -> None:
        row = self.words.row
        replaced: dict[str, Any] = {
            "exchange": self.words.exchange,
            "publish": self.words.publish,
            "pointer": lambda address: address,
            "carray": lambda *_: row,
            "recv": lambda *_: self._received(),
            "is_recent": lambda at: True,
            "is_next": lambda at: self.in_hand.pop() == "next" if self.in_hand[-1] == "next" else False,
            "stepped": lambda at: self._step(),
            "replied": lambda at: True,
            "advance": lambda at: None,
            "epoll_ctl": lambda *_: 0,
            "write": lambda *_: self._ring(),
        }
        for name, replacement in replaced.items():
            patch.setattr(lane, name, replacement)
        patch.setattr(lane_loop.os, "eventfd_write", lambda *_: self._ring())
        row[word.ROWS], row[word.LENGTH] = 8, 8

    def _received(self) -> int:
        if not self.datagrams:
            return -1
        self.in_hand.append(self.datagrams.pop(0))
        return 8

    def _ring(self) -> None:
        self.bells += 1

    def _alone(self, who: str, work: Callable[[], None]) -> None:
        """Do some work that nobody may do beside it."""
        assert not self.inside, (who, self.inside)
        self.inside.append(who)
        self.run.point()
        work()
        self.inside.pop()

    def _step(self) -> bool:
        def step() -> None:
            self.applied += 1
            self.words.row[word.ROW] += 1

        self._alone("lane", step)
        return True

    # --- the session's side: a `Grant` ---------------------------------------------------------------------

    def end(self) -> None:
        self.seat.end()

    def settle(self) -> None:
        self._alone("settle", lambda: self.told.append(self.applied))
        self.words.row[word.ROW] = 0

    def _begin(self) -> bool:
        assert self.words.exchange(0, word.OVER, word.OPEN)
        self.run.point()
        return True

    # --- the threads -------------------------------------------------------------------------------------------

    def loop(self) -> None:
        for _ in range(len(self.datagrams)):
            lane.serve(0, 0)

    def granter(self) -> None:
        with self.lock:
            assert self.lock.give(self, self._begin)

    def locker(self) -> None:
        with self.lock:
            assert self.told[-1] == self.applied, "whoever has the lock knows of every step"
            assert self.words.row[word.WORD] == word.OVER
            self._alone("locker", lambda: None)

    def reader(self) -> None:
        before = self.applied
        self.lock.settle()
        assert self.told[-1] >= before, "a reader knows of every step that was made before"

    def check(self) -> None:
        """Check the end of a run: the grant was over, and its thread was woken, once."""
        self.run.unnamed(self.lock.settle)  # where the grant came last
        assert self.words.row[word.WORD] == word.OVER
        assert self.bells == 1
        assert len(self.told) == 2
        assert self.told[-1] == self.applied


SCENES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "a step and a locker": (["next"], ("loop", "locker")),
    "two steps and a reader": (["next", "next"], ("loop", "reader")),
    "a step, another datagram, a locker": (["next", "other"], ("loop", "locker")),
    "no step, a locker and a reader": ([], ("locker", "reader")),
    "two lockers": ([], ("locker", "locker 2")),
    "a grant, a step and a reader": (["next"], ("granter", "loop", "reader")),
}
if os.environ.get("STEPWIRE_LONG_TESTS"):
    SCENES["two steps and a locker"] = (["next", "next"], ("loop", "locker"))
    SCENES["a step, a locker and a reader"] = (["next"], ("loop", "locker", "reader"))


@pytest.mark.parametrize("name", SCENES)
def test_no_interleaving_has_two_at_work_or_loses_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datagrams, threads = SCENES[name]
    scenes: list[Scene] = []

    def scene(run: Interleaving) -> dict[str, Callable[[], None]]:
        if scenes:
            scenes[-1].check()
        made = Scene(run, monkeypatch, list(datagrams))
        scenes.append(made)
        if "granter" not in threads:
            run.unnamed(made.granter)
        return {thread: getattr(made, thread.split()[0]) for thread in threads}

    assert every_interleaving(scene) == len(scenes) > 1
    scenes[-1].check()


def test_a_lock_without_a_grant_is_an_ordinary_lock() -> None:
    lock = SessionLock()
    lock.settle()
    with lock:
        assert not lock.acquire(blocking=False)
    assert lock.acquire()
    lock.release()


def test_a_grant_that_does_not_begin_is_none() -> None:
    class Untouched:
        def end(self) -> None:
            raise AssertionError

        def settle(self) -> None:
            raise AssertionError

    def broken() -> bool:
        raise OSError("no descriptors")

    lock = SessionLock()
    with lock:
        assert not lock.give(Untouched(), lambda: False)
        with pytest.raises(OSError, match="no descriptors"):
            lock.give(Untouched(), broken)
    lock.settle()
    with lock:
        pass


def test_a_settlement_that_fails_leaves_the_lock_free() -> None:
    class Failing:
        def end(self) -> None:
            raise RuntimeError("broken")

        def settle(self) -> None:
            raise AssertionError

    lock = SessionLock()
    assert lock.give(Failing(), lambda: True)
    with pytest.raises(RuntimeError), lock:
        raise AssertionError
    assert lock.acquire(blocking=False)
