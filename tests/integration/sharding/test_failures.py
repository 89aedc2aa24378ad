"""A shard, a connection or a client that fails: each shard is stepped once, and what cannot be mended is told."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.connection.retry import Deadline
from stepwire.results import Snapshot
from stepwire.sharding.coordinator import Coordinator
from stepwire_server.server import Server
from tests.integration.events import Clock
from tests.integration.link import Cut
from tests.integration.proxy import Proxy
from tests.integration.sharding.pair import SHAPES, Opened, Pair, arrays, over
from tests.integration.training import bits

pytestmark = pytest.mark.many


@pytest.fixture
def proxied(servers: list[Server], opened: Opened) -> Iterator[tuple[stepwire.Client, Proxy]]:
    """Three servers, the second behind a network that fails."""
    with Proxy(servers[1].target) as proxy:
        yield opened((servers[0].target, proxy.target, servers[2].target)), proxy


@pytest.fixture
def unhurried(exits: contextlib.ExitStack) -> Callable[[list[Server]], stepwire.Client]:
    """Open clients for whom time passes only while they pause."""

    def opened(servers: list[Server]) -> stepwire.Client:
        clock = Clock()
        retry = stepwire.Retry(clock=clock, sleep=clock.advance)
        return exits.enter_context(stepwire.connect([each.target for each in servers], transport="tcp", retry=retry))

    return opened


def counts(session: stepwire.Session) -> list[int]:
    """Return the steps that each server has applied, as it says itself."""
    return [shard.info().applied_step for shard in session.shards]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"clip_grad_norm": 1.0}, {"non_finite": "allow"}], ids=["two_phases", "one_phase"])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_shard_cut_off_at_any_message_is_stepped_once(
    proxied: tuple[stepwire.Client, Proxy], one: stepwire.Client, options: dict[str, Any], direction: Any
) -> None:
    """Before it has staged, between the two halves of the commit, within the answer: the others are left alone."""
    many, proxy = proxied
    pair = Pair(one, many, SHAPES, **options)
    step = 0
    for after in range(100):
        step += 1
        pair.step(arrays(SHAPES, step))  # so that the connection is open and quiet
        cuts = proxy.cuts
        proxy.arm(Cut(direction, "message", after))
        step += 1
        gradient = arrays(SHAPES, step)
        assert bits(pair.cut.step(gradient)) == bits(pair.whole.step(gradient))
        proxy.disarm()
        assert counts(pair.cut) == [step] * 3
        if proxy.cuts == cuts:
            break
    assert after >= 3
    pair.compare()
    pair.close()


class Lost(Exception):
    """Stands for whatever ends one shard's part of a step."""


@pytest.mark.parametrize("others", [0, 1])
def test_a_shard_that_failed_after_the_decision_is_finished_by_the_next_call(
    servers: list[Server], opened: Opened, one: stepwire.Client, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """The others have stepped, and do not step again; where none has, the next call decides anew."""
    pair = Pair(one, over(servers, opened, 2), SHAPES, clip_grad_norm=1.0)
    pair.step(arrays(SHAPES, 1))
    decide = Coordinator.decide

    def decide_and_be_lost(self: Coordinator, shard: int, staged: Any, deadline: Deadline) -> Any:
        commit = decide(self, shard, staged, deadline)
        if shard >= others:
            raise Lost
        return commit

    with monkeypatch.context() as patched:
        patched.setattr(Coordinator, "decide", decide_and_be_lost)
        with pytest.raises(Lost):
            pair.cut.step(arrays(SHAPES, 2 if others else 7))
    assert pair.cut.applied_step == 1
    assert [server_step(servers[rank], pair.cut, rank) for rank in range(2)] == [1 + others, 1]
    gradient = arrays(SHAPES, 2)
    assert bits(pair.cut.step(gradient)) == bits(pair.whole.step(gradient))
    assert pair.cut.applied_step == 2
    pair.compare_results()
    pair.step(arrays(SHAPES, 3))
    pair.compare()
    pair.close()


def test_a_client_that_ends_after_the_decision_leaves_what_only_a_load_mends(
    servers: list[Server], opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = over(servers, opened, 2)
    session = many.create_session(arrays(SHAPES, 0), clip_grad_norm=1.0)
    assert len(session.shards) == 2
    state = session.state()
    decide = Coordinator.decide

    def decide_and_end(self: Coordinator, shard: int, staged: Any, deadline: Deadline) -> Any:
        commit = decide(self, shard, staged, deadline)
        if shard == 0:
            raise Lost
        return commit

    with monkeypatch.context() as patched:
        patched.setattr(Coordinator, "decide", decide_and_end)
        with pytest.raises(Lost):
            session.step(arrays(SHAPES, 1))
    session.detach()
    later = many.session(session.session_id)
    with pytest.raises(stepwire.StepMismatchError) as uneven:
        later.step(arrays(SHAPES, 1))
    assert uneven.value.metadata == {"steps": "0,1", "expected_step": "1", "actual_step": "1"}
    later.load_state(dataclasses.replace(state, step=1))
    assert later.applied_step == 1
    later.step(arrays(SHAPES, 1))
    later.close()


def server_step(server: Server, session: stepwire.Session, rank: int) -> int:
    """Ask the server itself, in this process, where a shard is."""
    return server.registry.get(session.session_id.split(",")[rank]).ledger.applied_step


def test_a_shard_that_is_gone_before_it_has_staged_stops_all(servers: list[Server], opened: Opened) -> None:
    many = over(servers, opened, 3)
    session = many.create_session(arrays(SHAPES, 0), clip_grad_norm=1.0)
    assert len(session.shards) == 3
    session.step(arrays(SHAPES, 1))
    session.shards[1].close()
    for _ in range(2):
        with pytest.raises(stepwire.SessionNotFoundError, match=rf"shard 1 on {servers[1].target}") as gone:
            session.step(arrays(SHAPES, 2))
        assert gone.value.metadata["last_known_step"] == "1"
        assert [server_step(servers[rank], session, rank) for rank in (0, 2)] == [1, 1]
    session.close()


def test_a_client_that_ends_between_two_shards_is_told_of_to_the_next(
    servers: list[Server],
    opened: Opened,
    one: stepwire.Client,
    unhurried: Callable[[list[Server]], stepwire.Client],
) -> None:
    many = over(servers, opened, 2)
    pair = Pair(one, many, SHAPES, non_finite="allow")
    pair.step(arrays(SHAPES, 1))
    good: Snapshot = pair.cut.state()
    pair.cut.detach()
    lone = opened((servers[1].target,)).session(pair.cut.session_id.split(",")[1])
    lone.step({name: np.zeros(shape, np.float32) for name, shape in lone.shapes.items()})
    later = many.session(pair.cut.session_id)
    assert len(later.shards) == 2
    told = "shard 0 on .* is at step 1, shard 1 on .* is at step 2.*load_state, its step not below 2"
    for call in (lambda: later.applied_step, lambda: later.step(arrays(SHAPES, 2))):
        with pytest.raises(stepwire.StepMismatchError, match=told):
            call()
    with pytest.raises(stepwire.StepMismatchError, match=r"different steps, at last \[1, 2\]"):
        unhurried(servers[:2]).session(pair.cut.session_id).pull(timeout=120.0)
    later.load_state(dataclasses.replace(good, step=2))
    pair.whole.load_state(dataclasses.replace(good, step=2))
    pair.cut = later
    pair.step(arrays(SHAPES, 3))
    pair.compare()
    pair.close()
