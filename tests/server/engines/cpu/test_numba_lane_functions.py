"""The functions of compiled lanes, as Python: numbers as every other step has them, and bytes as they are expected."""

from __future__ import annotations

import ctypes
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.optimizers.norms import clip_coefficient, rounded_norm
from stepwire_server.engines.cpu import lane_words as word
from stepwire_server.rpc.lane_messages import encode_varint

lane = pytest.importorskip("stepwire_server.engines.cpu.numba_lane_functions")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the functions see memory by its address, as compiled ones do."""

    def array(address: int, shape: Any, dtype: Any) -> Any:
        count = int(np.prod(shape))
        room = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(int(address))
        return np.frombuffer(room, dtype).reshape(shape)

    monkeypatch.setattr(lane, "pointer", lambda address: address)
    monkeypatch.setattr(lane, "carray", array)


@given(st.floats(0.0, 1e300) | st.sampled_from([math.inf, math.nan]))
def test_a_norm_is_that_of_every_other_step_or_left_to_python(total: float) -> None:
    def doubtful() -> Any:
        raise ArithmeticError

    norm = lane.norm_of(total)
    try:
        assert norm == rounded_norm(total, doubtful) or (norm == -1.0 and not math.isfinite(total))
    except ArithmeticError:
        assert norm == -1.0


@pytest.mark.parametrize("formula", word.CLIPS)
@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 3.0])
def test_factors_of_clipping_are_those_of_every_other_step(formula: Any, norm: float) -> None:
    assert lane.factor_of(norm, 1.0, 1 + word.CLIPS.index(formula)) == clip_coefficient(norm, 1.0, formula)
    assert lane.factor_of(norm, 0.0, 0) == 1.0


@pytest.mark.parametrize("number", [1, 126, 128, 255, 16_383 - 1, 16_384, 2**28 + 127])
def test_numbers_count_up_in_their_bytes(memory: None, number: int) -> None:
    digits = [np.frombuffer(bytearray(encode_varint(each)), np.uint8) for each in (number, 1)]
    counters = np.array([(each.ctypes.data, len(each)) for each in digits], np.int64)
    row = np.zeros(word.WIDTH, np.int64)
    row[word.COUNTERS], row[word.COUNTER_COUNT] = counters.ctypes.data, len(counters)
    lane.advance(row)
    assert [each.tobytes() for each in digits] == [encode_varint(number + 1), encode_varint(2)]


def test_a_head_is_next_only_if_every_byte_is(memory: None) -> None:
    expected, row = np.arange(40, dtype=np.uint8), np.zeros(word.WIDTH, np.int64)
    received = expected.copy()
    row[word.HEAD], row[word.EXPECTED], row[word.RECEIVED] = 40, expected.ctypes.data, received.ctypes.data
    assert lane.is_next(row)
    for place in (0, 17, 39):
        received[place] ^= 1
        assert not lane.is_next(row)
        received[place] ^= 1


def waits(monkeypatch: pytest.MonkeyPatch, row: Any, found_at: int | None) -> list[int]:
    """Wait once for datagrams, on a clock of 10 µs a look; return the time-outs of all calls of epoll_wait."""
    asked: list[int] = []
    clock = itertools.count(0.0, 1e-5)

    def epoll_wait(epoll: int, events: int, most: int, timeout: int) -> int:
        asked.append(timeout)
        return 1 if timeout < 0 or len(asked) == found_at else 0

    monkeypatch.setattr(lane, "now", lambda at: next(clock))
    monkeypatch.setattr(lane, "epoll_wait", epoll_wait)
    assert lane.awaited(row, 3, 0, 4, 5e-5) == 1
    return asked


def test_a_loop_waits_awake_for_a_moment_and_sleeps_then(monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.zeros(word.WIDTH, np.int64)
    assert waits(monkeypatch, row, found_at=3) == [0, 0, 0]
    assert waits(monkeypatch, row, found_at=None) == [0, 0, 0, 0, -1], "a look each 10 µs, within 50 µs"


def test_moments_in_vain_rest_and_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.zeros(word.WIDTH, np.int64)
    for _ in range(lane.SPIN_MISSES):
        assert len(waits(monkeypatch, row, found_at=None)) == 5
    for _ in range(lane.SPIN_REST):
        assert waits(monkeypatch, row, found_at=None) == [-1]
    for _ in range(3):
        assert waits(monkeypatch, row, found_at=1) == [0]


def test_a_grant_ends_when_its_first_step_is_long_ago(memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    records, row = np.zeros((2, word.COLUMNS)), np.zeros(word.WIDTH, np.int64)
    row[word.RECORDS], records[0, word.BEGAN] = records.ctypes.data, 100.0
    monkeypatch.setattr(lane, "now", lambda at: 100.0 + lane.GRANT_SECONDS)
    assert lane.is_recent(row), "there was no step yet"
    row[word.ROW] = 1
    assert not lane.is_recent(row)
    monkeypatch.setattr(lane, "now", lambda at: 100.5)
    assert lane.is_recent(row)
