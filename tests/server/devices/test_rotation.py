"""Deficit round robin in virtual time: shares, order, and that nobody starves."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stepwire_server.devices.rotation import Queue, Rotation, TurnRequest

QUANTUM = 100
LARGEST = 250


def jain(shares: list[float]) -> float:
    """Return Jain's index: 1 for equal shares, 1/n where one of n has all."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def served(root: Rotation, queues: list[Queue], costs: list[int], total: int) -> list[int]:
    """Serve queues that always have a request of their cost, and return the bytes of each, `total` in all."""
    owners = {}
    for index, queue in enumerate(queues):
        owners[queue] = index
        queue.push(Owned(costs[index], index))
    done = [0] * len(queues)
    while sum(done) < total:
        request = root.pop()
        assert isinstance(request, Owned)
        done[request.owner] += request.cost_bytes
        queues[request.owner].push(Owned(costs[request.owner], request.owner))
    return done


class Owned(TurnRequest):
    """A request that knows its queue."""

    def __init__(self, cost_bytes: int, owner: int) -> None:
        super().__init__(cost_bytes)
        self.owner = owner


# --- shares -------------------------------------------------------------------------------------------------------

COSTS = st.integers(1, LARGEST)
WEIGHTS = st.integers(1, 9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(COSTS, WEIGHTS), min_size=2, max_size=12))
def test_shares_are_as_the_weights_within_a_round_and_a_request(loads: list[tuple[int, int]]) -> None:
    root = Rotation(QUANTUM)
    queues = [Queue(root, weight) for _, weight in loads]
    done = served(root, queues, [cost for cost, _ in loads], 20 * QUANTUM * sum(weight for _, weight in loads))
    rates = [each / weight for each, (_, weight) in zip(done, loads, strict=True)]
    assert max(rates) - min(rates) <= 2 * QUANTUM + LARGEST


@settings(max_examples=25, deadline=None)
@given(st.lists(COSTS, min_size=2, max_size=40))
def test_jains_index_of_any_costs_with_one_weight_is_near_one(costs: list[int]) -> None:
    root = Rotation(QUANTUM)
    done = served(root, [Queue(root) for _ in costs], costs, 20 * QUANTUM * len(costs))
    assert jain([float(each) for each in done]) >= 0.95


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(WEIGHTS, st.lists(COSTS, min_size=1, max_size=6)), min_size=2, max_size=4),
)
def test_tenants_share_by_weight_however_many_sessions_each_has(tenants: list[tuple[int, list[int]]]) -> None:
    root = Rotation(QUANTUM)
    rotations = [Rotation(QUANTUM, root, weight) for weight, _ in tenants]
    pairs = [(index, cost) for index, (_, costs) in enumerate(tenants) for cost in costs]
    queues = [Queue(rotations[index]) for index, _ in pairs]
    done = served(root, queues, [cost for _, cost in pairs], 20 * QUANTUM * sum(weight for weight, _ in tenants))
    rates = [0.0] * len(tenants)
    for (index, _), each in zip(pairs, done, strict=True):
        rates[index] += each / tenants[index][0]
    assert max(rates) - min(rates) <= 2 * QUANTUM + LARGEST
    for index in range(len(tenants)):
        own = [float(each) for (tenant, _), each in zip(pairs, done, strict=True) if tenant == index]
        assert max(own) - min(own) <= 2 * QUANTUM + LARGEST


@pytest.mark.parametrize(("absence", "share"), [(1, 0.5), (3, 0.5), (5, 0.444), (7, 0.375), (12, 0.25)])
def test_a_session_that_asks_again_a_moment_later_has_its_share(absence: int, share: float) -> None:
    """A large step asks for a pass, computes its reply, and asks for the next: it never has two requests.

    It has its half as long as it is back before the others have had as many bytes, and then as much as it asks for.
    """
    root = Rotation(QUANTUM)
    small, large = Rotation(QUANTUM, root), Rotation(QUANTUM, root)
    many, alone = [Queue(small) for _ in range(50)], Queue(large)
    for index, queue in enumerate(many):
        queue.push(Owned(10, index))
    alone.push(Owned(40, -1))
    back: deque[int] = deque()
    done = {True: 0, False: 0}
    for turn in range(4000):
        while back and back[0] <= turn:
            back.popleft()
            alone.push(Owned(40, -1))
        request = root.pop()
        assert isinstance(request, Owned)
        done[request.owner < 0] += request.cost_bytes
        if request.owner < 0:
            back.append(turn + absence)
        else:
            many[request.owner].push(Owned(10, request.owner))
    assert done[True] / sum(done.values()) == pytest.approx(share, abs=0.02)


def test_unused_shares_are_not_saved_up() -> None:
    root = Rotation(QUANTUM)
    busy, idle = Queue(root), Queue(root)
    for _ in range(200):
        busy.push(Owned(50, 0))
    for _ in range(100):
        root.pop()
    for _ in range(100):
        idle.push(Owned(50, 1))
    owners = [root.pop().owner for _ in range(40)]  # type: ignore[attr-defined]
    assert 18 <= sum(owners) <= 22


def test_a_request_larger_than_many_rounds_is_paid_for_in_those_to_come() -> None:
    root = Rotation(QUANTUM)
    huge, small = Queue(root), Queue(root)
    for _ in range(2):
        huge.push(Owned(1000, 1))
    for _ in range(300):
        small.push(Owned(10, 0))
    owners = [root.pop().owner for _ in range(250)]  # type: ignore[attr-defined]
    first, second = (index for index, owner in enumerate(owners) if owner)
    assert second - first - 1 == pytest.approx(100, abs=10)  # 1,000 bytes of the small ones


def test_a_waiting_request_can_be_withdrawn_at_every_depth() -> None:
    root = Rotation(QUANTUM)
    tenant = Rotation(QUANTUM, root)
    queue, other = Queue(tenant), Queue(root)
    one, two, three = Owned(5, 0), Owned(5, 0), Owned(5, 1)
    for each in (one, two):
        queue.push(each)
    other.push(three)
    queue.withdraw(one)
    queue.withdraw(two)
    assert not queue and not tenant and root
    assert root.pop() is three
    assert not root
    queue.push(one)
    assert root.pop() is one


# --- a model: any order of requests, services and withdrawals ---------------------------------------------------------


class Turns(RuleBasedStateMachine):
    """Two tenants of different weights with sessions, beside a list of the requests that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Rotation(QUANTUM)
        self.weights = [1, 3]
        self.tenants = [Rotation(QUANTUM, self.root, weight) for weight in self.weights]
        self.queues = [Queue(tenant) for tenant in self.tenants for _ in range(3)]
        self.waiting: list[deque[Owned]] = [deque() for _ in self.queues]
        self.passed: dict[int, float] = {}

    @rule(index=st.integers(0, 5), cost=COSTS)
    def ask(self, index: int, cost: int) -> None:
        request = Owned(cost, index)
        if not self.waiting[index]:
            self.passed[index] = 0.0
        self.waiting[index].append(request)
        self.queues[index].push(request)

    @precondition(lambda self: any(self.waiting))
    @rule()
    def serve(self) -> None:
        request: Any = self.root.pop()  # work conserving: whoever waits, somebody is served
        assert request is self.waiting[request.owner].popleft()  # in the order of its session
        for index, waiting in enumerate(self.waiting):
            if waiting or index == request.owner:
                self.passed[index] = 0.0 if index == request.owner else self.passed[index] + request.cost_bytes

    @precondition(lambda self: any(self.waiting))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from([index for index, waiting in enumerate(self.waiting) if waiting]))
        request = data.draw(st.sampled_from(list(self.waiting[index])))
        self.waiting[index].remove(request)
        self.queues[index].withdraw(request)

    @invariant()
    def knows_who_waits(self) -> None:
        assert bool(self.root) is any(self.waiting)
        for tenant, own in zip(self.tenants, (self.waiting[:3], self.waiting[3:]), strict=True):
            assert bool(tenant) is any(own)

    @invariant()
    def nobody_starves(self) -> None:
        """A request waits for the rounds that it is behind, and for the one under way, of its tenant and of all."""
        rounds = math.ceil(LARGEST / QUANTUM) + 2
        within = 2 * (QUANTUM + LARGEST) * rounds
        others = (sum(self.weights) * QUANTUM + LARGEST) * (within / QUANTUM + rounds)
        assert all(self.passed[index] <= within + others for index, waiting in enumerate(self.waiting) if waiting)


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
