"""The loops of compiled lanes: made beside the steps, one for each kind, and gone with their engine."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.wire.dtypes import BFLOAT16, FLOAT32
from stepwire_server.engines.compiled.common_kernels import commonest
from stepwire_server.engines.cpu import lane_loop
from stepwire_server.engines.cpu import lane_words as word
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.engines.cpu.lane_loop import LaneLoop, LaneLoops
from stepwire_server.rules import Recipe

RECIPE = commonest()[0].recipe


class Kernels:
    """Kernels of a loop that serves nobody."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem
        self.made: list[str] = []

    def lane(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Callable[..., None]:
        self.made.append(gradient.name)
        if self.problem is not None:
            raise self.problem
        return lambda rows, epoll, events, most, moment: None

    def exchange(self) -> Callable[[int, int, int], bool]:
        return lambda address, expected, value: True


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


def test_a_loop_is_made_once_for_each_kind_and_never_waited_for() -> None:
    kernels = Kernels()
    loops = LaneLoops(kernels)
    assert loops.loop(RECIPE, FLOAT32, None) is None
    loops.settle()
    loop = loops.loop(RECIPE, FLOAT32, None)
    assert loop is not None
    assert loops.loop(RECIPE, FLOAT32, None) is loop
    loops.loop(RECIPE, BFLOAT16, None)
    loops.settle()
    assert kernels.made == ["float32", "bfloat16"]
    loops.close()
    loops.close()
    assert loops.loop(RECIPE, FLOAT32, FLOAT32) is None


def test_kernels_that_cannot_be_made_leave_steps_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    kernels = Kernels(MemoryError("no room"))
    loops = LaneLoops(kernels)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert loops.loop(RECIPE, FLOAT32, None) is None
            loops.settle()
    assert kernels.made == ["float32"], "nobody tries again with each step"
    assert "no compiled lane" in caplog.text
    loops.close()


def test_a_process_without_threads_leaves_steps_as_they_are_and_tries_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    kernels = Kernels()
    loops = LaneLoops(kernels)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(threading.Thread, "start", refuse)
        assert loops.loop(RECIPE, FLOAT32, None) is None
    assert "no compiled lane for" in caplog.text
    loops.loop(RECIPE, FLOAT32, None)
    loops.settle()
    assert loops.loop(RECIPE, FLOAT32, None) is not None
    assert kernels.made == ["float32"]
    loops.close()


def test_kinds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_loop, "_MOST_LOOPS", 1)
    kernels = Kernels()
    loops = LaneLoops(kernels)
    for dtype in (FLOAT32, BFLOAT16):
        loops.loop(RECIPE, dtype, None)
        loops.settle()
    assert kernels.made == ["float32"]
    loops.close()


def test_seats_are_bounded_and_given_back(monkeypatch: pytest.MonkeyPatch, pair: Any) -> None:
    monkeypatch.setattr(lane_loop, "_MOST_LANES", 1)
    kernels = Kernels()
    loop = LaneLoop(kernels.lane(RECIPE, FLOAT32, None), kernels.exchange())
    held = len(os.listdir("/proc/self/fd"))
    seat = loop.seat(pair[0])
    assert seat is not None and loop.seat(pair[1]) is None
    assert (seat.row[word.FD], seat.row[word.WORD], seat.seen) == (pair[0].fileno(), word.OVER, 0.0)
    seat.leave()
    closed = socket.socket()
    closed.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.seat(closed)
    assert len(os.listdir("/proc/self/fd")) == held
    again = loop.seat(pair[1])
    assert again is not None
    loop.close()
    again.leave()


def test_an_engine_without_compiled_kernels_has_no_loops() -> None:
    engine = CpuEngine(threads=1, use_numba=False)
    assert engine.lanes is None
    engine.close()
