"""Turns of an engine among threads: who has them, who waits, and that none is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stepwire.errors import InvalidRequestError
from stepwire_server.devices import fair_share
from stepwire_server.devices.fair_share import QUANTUM_BYTES, FairShare, Flow, parse_weights

SMALL, LARGE = 1 << 18, 8 * QUANTUM_BYTES
PASS_BYTES = 32 << 20
Until = Callable[[Callable[[], bool]], None]


class Buffers:
    """A state that counts how often it gave its buffers back; stands for an `EngineState`."""

    def __init__(self) -> None:
        self.yielded = 0

    def yield_buffers(self, gradient: Any) -> None:
        """See `EngineState.yield_buffers`."""
        self.yielded += 1


class Line:
    """Requests that wait, each in a thread of its own; every one gives its turn back when it is told to.

    Attributes:
        order: the names of those that have had a turn.
    """

    def __init__(self, share: FairShare, until: Until) -> None:
        self.order: list[str] = []
        self.share = share
        self._until = until
        self._threads: list[threading.Thread] = []

    def wait(self, flow: Flow, name: str, nbytes: int = SMALL) -> None:
        """Have a request wait behind those before."""

        def work() -> None:
            began = flow.acquire(nbytes, Buffers())  # type: ignore[arg-type]
            self.order.append(name)
            flow.release(began)

        before = self.share.statistics().waiting
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()
        self._until(lambda: self.share.statistics().waiting == before + 1)

    def join(self) -> None:
        """Wait until all have had their turns."""
        for thread in self._threads:
            thread.join(60.0)
            assert not thread.is_alive(), "a turn was lost"


@pytest.fixture
def share() -> Iterator[FairShare]:
    made = FairShare({"lab": 3}, turns=1)
    yield made
    assert made.statistics() == (0, 0), "a turn was lost"


@pytest.fixture
def line(share: FairShare, until: Until) -> Line:
    return Line(share, until)


def held(flow: Flow) -> float:
    return flow.acquire(SMALL, Buffers())  # type: ignore[arg-type]


def test_a_free_turn_comes_at_once_and_costs_no_buffers() -> None:
    share, state = FairShare(turns=2), Buffers()
    one, two = share.flow(SMALL), share.flow(LARGE)
    began = [flow.acquire(SMALL, state) for flow in (one, two)]  # type: ignore[arg-type]
    assert (share.statistics(), state.yielded) == ((2, 0), 0)
    one.release(began[0] - 2.0)
    two.release(began[1])
    assert share.statistics() == (0, 0)
    assert one.seconds >= 2.0 > two.seconds >= 0.0


def test_a_request_that_waits_gives_back_buffers_first(share: FairShare, line: Line) -> None:
    flow, state = share.flow(SMALL), Buffers()
    began = held(flow)
    seen: list[int] = []

    def yield_buffers(gradient: Any) -> None:
        seen.append(share.statistics().waiting)
        flow.release(began)

    state.yield_buffers = yield_buffers  # type: ignore[method-assign]
    again = flow.acquire(SMALL, state, None)  # type: ignore[arg-type]  # the turn was given back meanwhile
    assert seen == [0]
    flow.release(again)


def test_requests_of_a_session_are_served_as_they_came(share: FairShare, line: Line) -> None:
    flow = share.flow(SMALL)
    began = held(flow)
    for name in "abcd":
        line.wait(flow, name)
    flow.release(began)
    line.join()
    assert line.order == list("abcd")


def test_small_sessions_take_turns_and_a_large_one_has_every_other_visit(share: FairShare, line: Line) -> None:
    small, large = [share.flow(SMALL) for _ in range(4)], share.flow(LARGE)
    began = held(small[0])
    for turn in range(3):
        for index, flow in enumerate(small):
            line.wait(flow, f"small {index} {turn}")
    for turn in range(3):
        line.wait(large, f"large {turn}", PASS_BYTES)
    small[0].release(began)
    line.join()
    ours = [name for name in line.order if name.startswith("small")]
    assert ours == [f"small {index} {turn}" for turn in range(3) for index in range(4)]
    places = [index for index, name in enumerate(line.order) if name.startswith("large")]
    assert places[0] <= 1 and places[1] <= 3  # the half of the bytes, until it has had its round's
    assert places[2] <= 12


def test_a_tenant_with_one_session_waits_for_no_line_of_another_tenant(share: FairShare, line: Line) -> None:
    crowd, alone = [share.flow(SMALL, "shop") for _ in range(8)], share.flow(SMALL, "lab")
    began = held(alone)
    for flow in crowd:
        line.wait(flow, "shop")
    line.wait(alone, "lab")
    line.wait(alone, "lab")
    alone.release(began)
    line.join()
    assert line.order[:4] == ["shop", "lab", "shop", "lab"]


def test_weights_are_those_of_tenants(share: FairShare, line: Line) -> None:
    one, three = share.flow(LARGE, "shop"), share.flow(LARGE, "lab")
    began = held(one)
    for _ in range(12):
        line.wait(one, "shop", PASS_BYTES)
        line.wait(three, "lab", PASS_BYTES)
    one.release(began)
    line.join()
    assert 8 <= line.order[:12].count("lab") <= 10


def test_a_session_given_to_a_tenant_counts_as_one_of_it(share: FairShare, line: Line) -> None:
    moved, crowd = share.flow(SMALL), [share.flow(SMALL) for _ in range(6)]
    moved.give_to("lab")
    began = held(moved)
    for flow in crowd:
        line.wait(flow, "others")
    line.wait(moved, "moved")
    moved.release(began)
    line.join()
    assert line.order.index("moved") <= 1


@pytest.mark.parametrize("granted", [False, True], ids=["before its turn", "as its turn comes"])
def test_an_interrupted_wait_leaves_no_request_and_no_turn(
    share: FairShare, line: Line, monkeypatch: pytest.MonkeyPatch, granted: bool
) -> None:
    flow, other = share.flow(SMALL), share.flow(SMALL)
    began = held(other)

    class Interrupted(fair_share._Turn):
        """A turn whose wait is interrupted."""

        def __init__(self, cost_bytes: int) -> None:
            super().__init__(cost_bytes)
            self.gate = self  # type: ignore[assignment]

        def acquire(self) -> None:
            """Be interrupted, perhaps just after the turn has come."""
            if granted:
                other.release(began)
            raise KeyboardInterrupt

        def release(self) -> None:
            """Come."""

    with monkeypatch.context() as patch:
        patch.setattr(fair_share, "_Turn", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            held(flow)
    if not granted:
        assert share.statistics() == (1, 0)
        line.wait(flow, "next")
        other.release(began)
        line.join()
        assert line.order == ["next"]


def test_turns_are_never_more_than_there_are_and_none_is_lost() -> None:
    share = FairShare(turns=2)
    flows = [share.flow(SMALL if index % 3 else LARGE, f"tenant {index % 2}") for index in range(12)]
    lock, inside, most = threading.Lock(), 0, 0

    def work(flow: Flow) -> None:
        nonlocal inside, most
        for _ in range(50):
            began = held(flow)
            with lock:
                inside += 1
                most = max(most, inside)
            with lock:
                inside -= 1
            flow.release(began)

    threads = [threading.Thread(target=work, args=(flow,), daemon=True) for flow in flows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert not any(thread.is_alive() for thread in threads)
    assert most <= 2 and share.statistics() == (0, 0)


def test_weights_are_read_and_a_tenant_has_one() -> None:
    assert parse_weights("") == {}
    assert parse_weights("lab=3,shop=12") == {"lab": 3, "shop": 12}
    with pytest.raises(InvalidRequestError, match="tenant_weights: tenant 'lab' has two weights; give one"):
        parse_weights("lab=3,shop=1,lab=3")
