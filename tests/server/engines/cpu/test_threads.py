"""Threads that share a range."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire_server.engines.cpu.threads import Shares
from stepwire_server.engines.protocol import GRAIN


@pytest.fixture
def make_shares():
    made: list[Shares] = []

    def make(threads: int) -> Shares:
        made.append(Shares(threads))
        return made[-1]

    yield make
    for shares in made:
        shares.close()
        shares.close()


@given(st.integers(1, 9), st.integers(0, 20 * GRAIN), st.integers(0, 4 * GRAIN))
def test_shares_make_up_the_range(threads: int, size: int, least: int) -> None:
    shares, ranges = Shares(threads), []
    shares.run(lambda first, count: ranges.append((first, count)), size, least)
    shares.close()
    ranges.sort()
    assert [first for first, _ in ranges] == [sum(count for _, count in ranges[:at]) for at in range(len(ranges))]
    assert sum(count for _, count in ranges) == size
    assert len(ranges) <= threads
    if size < least:
        assert ranges == [(0, size)]
    assert all(first % GRAIN == 0 and (count > 0 or size == 0) for first, count in ranges)
    assert all(first // (shares.share(size) or 1) == at for at, (first, _) in enumerate(ranges)), (
        "numbered by its start"
    )


@given(st.integers(1, 64), st.integers(0, 100 * GRAIN))
def test_a_share_is_whole_grains_and_enough(threads: int, size: int) -> None:
    shares = Shares(threads)
    share = shares.share(size)
    shares.close()
    assert share % GRAIN == 0
    assert share * threads >= size
    assert share < size / threads + GRAIN or size == 0


def test_the_caller_takes_the_first_share_and_others_the_rest(make_shares) -> None:
    workers: dict[int, str] = {}
    make_shares(3).run(lambda first, _: workers.update({first: threading.current_thread().name}), 3 * GRAIN, 0)
    assert workers.pop(0) == threading.current_thread().name
    assert len(workers) == 2
    assert all(name.startswith("stepwire-cpu") for name in workers.values())


def test_small_ranges_stay_with_the_caller(make_shares) -> None:
    names = []
    shares = make_shares(2)
    for size, least in [(0, 0), (1, 0), (GRAIN, 0), (5 * GRAIN, 6 * GRAIN)]:
        shares.run(lambda *_: names.append(threading.current_thread().name), size, least)
    assert names == [threading.current_thread().name] * 4


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_of_any_share_is_raised_when_all_have_ended(make_shares, failing) -> None:
    done = []

    def work(first: int, _: int) -> None:
        if first == failing * GRAIN:
            raise ArithmeticError(f"share {failing}")
        done.append(first)

    with pytest.raises(ArithmeticError, match=f"share {failing}"):
        make_shares(3).run(work, 3 * GRAIN, 0)
    assert sorted(done) == [place * GRAIN for place in range(3) if place != failing]


def test_many_callers_share_few_threads(make_shares) -> None:
    shares, totals = make_shares(2), []

    def call() -> None:
        counts: list[int] = []
        shares.run(lambda _, count: counts.append(count), 4 * GRAIN + 1, 0)
        totals.append(sum(counts))

    callers = [threading.Thread(target=call) for _ in range(20)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert totals == [4 * GRAIN + 1] * 20
