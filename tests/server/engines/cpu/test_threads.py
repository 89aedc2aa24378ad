"""Threads that work together on a range."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire_server.engines.cpu.threads import RangeThreads
from stepwire_server.engines.protocol import GRAIN


@pytest.fixture
def make_threads():
    made: list[RangeThreads] = []

    def make(threads: int) -> RangeThreads:
        made.append(RangeThreads(threads))
        return made[-1]

    yield make
    for range_threads in made:
        range_threads.close()
        range_threads.close()


@given(st.integers(1, 9), st.integers(0, 20 * GRAIN), st.integers(0, 4 * GRAIN))
def test_ranges_make_up_the_whole(threads: int, size: int, least: int) -> None:
    range_threads, ranges = RangeThreads(threads), []
    range_threads.run(lambda first, count: ranges.append((first, count)), size, least)
    range_threads.close()
    ranges.sort()
    assert [first for first, _ in ranges] == [sum(count for _, count in ranges[:at]) for at in range(len(ranges))]
    assert sum(count for _, count in ranges) == size
    assert len(ranges) <= threads
    if size < least:
        assert ranges == [(0, size)]
    assert all(first % GRAIN == 0 and (count > 0 or size == 0) for first, count in ranges)
    assert all(first // (range_threads.range_size(size) or 1) == at for at, (first, _) in enumerate(ranges)), (
        "numbered by its start"
    )


@given(st.integers(1, 64), st.integers(0, 100 * GRAIN))
def test_a_range_is_whole_grains_and_enough(threads: int, size: int) -> None:
    range_threads = RangeThreads(threads)
    range_size = range_threads.range_size(size)
    range_threads.close()
    assert range_size % GRAIN == 0
    assert range_size * threads >= size
    assert range_size < size / threads + GRAIN or size == 0


def test_the_caller_works_on_the_first_range_and_others_on_the_rest(make_threads) -> None:
    workers: dict[int, str] = {}
    make_threads(3).run(lambda first, _: workers.update({first: threading.current_thread().name}), 3 * GRAIN, 0)
    assert workers.pop(0) == threading.current_thread().name
    assert len(workers) == 2
    assert all(name.startswith("stepwire-cpu") for name in workers.values())


def test_small_ranges_stay_with_the_caller(make_threads) -> None:
    names = []
    range_threads = make_threads(2)
    for size, least in [(0, 0), (1, 0), (GRAIN, 0), (5 * GRAIN, 6 * GRAIN)]:
        range_threads.run(lambda *_: names.append(threading.current_thread().name), size, least)
    assert names == [threading.current_thread().name] * 4


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_of_any_share_is_raised_when_all_have_ended(make_threads, failing) -> None:
    done = []

    def work(first: int, _: int) -> None:
        if first == failing * GRAIN:
            raise ArithmeticError(f"share {failing}")
        done.append(first)

    with pytest.raises(ArithmeticError, match=f"share {failing}"):
        make_threads(3).run(work, 3 * GRAIN, 0)
    assert sorted(done) == [place * GRAIN for place in range(3) if place != failing]


def test_many_callers_share_few_threads(make_threads) -> None:
    range_threads, totals = make_threads(2), []

    def call() -> None:
        counts: list[int] = []
        range_threads.run(lambda _, count: counts.append(count), 4 * GRAIN + 1, 0)
        totals.append(sum(counts))

    callers = [threading.Thread(target=call) for _ in range(20)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert totals == [4 * GRAIN + 1] * 20
