"""Loads of several workers beside one another's steps and loads: each is made once, on all shards alike."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.links import pull_and_load
from stepwire.sharding import levelling
from stepwire.sharding.shard import Shard
from tests.integration.sharding.test_broken_moves import Places
from tests.integration.sharding.test_moves_of_workers import SIZE, WORKERS, Workers, stack, targets
from tests.integration.workers.together import together
from tests.support.numpy_server import numpy_server

__all__ = ["stack", "targets"]  # the fixtures

ONES = {"w": np.ones(SIZE, np.float32)}
SGD = stepwire.SGD(lr=1.0)
ASYNC = stepwire.Aggregation(workers=WORKERS, mode="async")
FIRST_ALONE = stepwire.Aggregation(workers=WORKERS, required_workers=1, reduction="sum")


def filled(value: float) -> dict[str, Any]:
    return {"w": np.full(SIZE, value, np.float32)}


def values(session: Any) -> set[float]:
    return set(session.pull()["w"].tolist())


def between_shards(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have something happen once, when a load has come to the first shard of two, and not to the second one."""
    load, first_is_loaded, ways = Shard.load, threading.Event(), [act]

    def interrupted(shard: Shard, *given: Any) -> None:
        if shard.rank == 1 and ways:
            assert first_is_loaded.wait(60.0)
            ways.pop()()
        load(shard, *given)
        if shard.rank == 0:
            first_is_loaded.set()

    monkeypatch.setattr(Shard, "load", interrupted)


def half_counted(
    stack: contextlib.ExitStack,
    targets: list[str],
    aggregation: Any,
    patch: pytest.MonkeyPatch,
    *,
    whole: bool = False,
    **options: Any,
) -> Workers:
    """Return workers of two shards, of which the second one alone counted a contribution of worker 0 before a load."""
    options |= {"aggregation": aggregation, "optimizer": SGD, "non_finite": "allow"}  # each shard decides by itself
    workers = Workers(stack, targets, shards=2, **options).join_all()
    first, second, _ = workers.sessions

    def step() -> None:
        with pytest.raises((stepwire.StateChangedError, stepwire.StepMismatchError), match="load"):
            first.step(ONES)

    for session in (first, second):
        session.pull()
        session.step(ONES)
    first.pull()
    state = second.state()
    with patch.context() as patched:
        between_shards(patched, step)
        second.load_state(dataclasses.replace(state, step=3 + state.step)) if whole else second.load(filled(1000.0))
    return workers


@pytest.mark.parametrize("aggregation", [ASYNC, FIRST_ALONE], ids=["async", "rounds"])
def test_a_worker_that_stepped_some_shards_before_a_load_goes_on_behind_it(
    targets: list[str], stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch, aggregation: Any
) -> None:
    workers = half_counted(stack, targets, aggregation, monkeypatch)
    first, second, _ = workers.sessions
    assert [shard.info(shard.deadline(None)).applied_step for shard in first._link.shards] == [3, 3]
    assert values(first) == {1000.0}
    first.step(ONES)
    assert values(second) == {999.0}
    second.step(ONES)
    assert values(first) == {998.0}
    assert {member.contribution for member in first.info().members if member.worker == 0} == {3}


@pytest.mark.parametrize("onto", [(3,), (2, 4), (0, 1, 2)], ids=str)
def test_a_model_moves_though_a_worker_stepped_some_shards_before_a_load(
    targets: list[str], stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch, onto: tuple[int, ...]
) -> None:
    workers = half_counted(stack, targets, ASYNC, monkeypatch, whole=True)
    first, second, _ = workers.sessions
    workers.move(*onto)
    assert values(first) == {-2.0}
    first.step(ONES)
    second.pull()
    second.step(ONES)
    assert values(first) == {-4.0}
    assert [member.contribution for member in first.info().members] == [3, 2]


def test_the_steps_of_others_meanwhile_end_once_a_shard_is_loaded(
    targets: list[str], stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that steps whenever it can finds no time at which all shards are alike, until the load is over."""
    workers = Workers(stack, targets, shards=2, aggregation=ASYNC, optimizer=SGD).join_all()
    first, second, _ = workers.sessions
    first.step(ONES)
    load_once, refused = levelling._load_in_turn, list[str]()

    def stepping(*given: Any) -> None:
        try:
            first.step(ONES)
        except stepwire.StepwireError as error:
            refused.append(type(error).__name__)
        load_once(*given)

    monkeypatch.setattr(levelling, "_load_in_turn", stepping)
    second.load(filled(1000.0))
    assert refused == ["StepMismatchError"]
    assert [shard.info(shard.deadline(None)).applied_step for shard in first._link.shards] == [2, 2]
    assert values(first) == {1000.0}
    first.step(ONES)
    assert values(second) == {999.0}


@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
def test_a_restarted_server_knows_whose_load_it_was_and_who_begins_anew(
    tmp_path: pathlib.Path, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    places = Places(tmp_path, stack)
    for name in "ab":
        places.serve(name)
    targets = [places.target(name) for name in "ab"]
    workers = half_counted(stack, targets, ASYNC, monkeypatch, durability=durability)
    first, second, third = workers.sessions
    send, servers = pull_and_load.send_load, list("ab")

    def lost(*given: Any) -> Any:
        reply = send(*given)
        if servers:
            places.serve(servers.pop())
            raise stepwire.UnavailableError("the reply was lost", reason=stepwire.Reason.UNREACHABLE)
        return reply

    monkeypatch.setattr(pull_and_load, "send_load", lost)
    second.load(filled(2000.0))
    monkeypatch.setattr(pull_and_load, "send_load", send)
    assert values(first) == {2000.0}
    first.step(ONES)
    third.load(filled(3000.0))
    assert values(first) == {3000.0}
    assert first.statistics().applied_load == second.statistics().applied_load + 1
    assert [member.contribution for member in first.info().members if member.worker == 0] == [3]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_load_counts_though_another_worker_has_loaded_unseen(
    targets: list[str], stack: contextlib.ExitStack, shards: int
) -> None:
    workers = Workers(stack, targets, shards=shards, aggregation=ASYNC, optimizer=SGD).join_all()
    first, second, third = workers.sessions
    for session in workers.sessions:
        session.attach()
    for value in (1000.0, 2000.0):
        first.load(filled(value))
    second.load(filled(3000.0))
    assert values(first) == {3000.0}
    third.load(filled(4000.0))
    assert values(second) == {4000.0}
    first.pull()
    first.step(ONES)
    assert values(second) == {3999.0}
    assert [session.statistics().applied_load for session in workers.sessions] == [5, 5, 5]


@pytest.mark.parametrize("shards", [1, 2])
def test_of_loads_that_all_workers_make_the_first_one_counts(
    targets: list[str], stack: contextlib.ExitStack, shards: int
) -> None:
    workers = Workers(stack, targets, shards=shards, aggregation=ASYNC, optimizer=SGD).join_all()
    for session in workers.sessions:
        session.step(ONES)
        session.loads_as_one = True
    for worker, session in enumerate(workers.sessions):
        if worker == 1:  # it has heard of the load, and not pulled it
            session.detach()
            session.attach()
        session.load(filled(1000.0 * (1 + worker)))
    for session in workers.sessions:
        assert values(session) == {1000.0}
        assert session.statistics().applied_load == 2
        assert {shard.info(shard.deadline(None)).applied_step for shard in session._link.shards} == {WORKERS}
    workers.sessions[2].step(ONES)
    assert values(workers.sessions[0]) == {999.0}


@pytest.mark.parametrize("shards", [1, 2])
def test_every_rollback_is_made(tmp_path: pathlib.Path, stack: contextlib.ExitStack, shards: int) -> None:
    servers = [stack.enter_context(numpy_server(data_dir=tmp_path / str(rank))) for rank in range(shards)]
    targets = [server.target for server in servers]
    options: dict[str, Any] = {"durability": "checkpoint", "optimizer": SGD, "aggregation": ASYNC}
    workers = Workers(stack, targets, shards=shards, **options).join_all()
    first, second, _ = workers.sessions
    second.attach()
    first.save_checkpoint("best")
    first.step(ONES)
    assert set(first.rollback(checkpoint="best")["w"].tolist()) == {0.0}
    first.step(ONES)
    assert set(second.rollback(checkpoint="best")["w"].tolist()) == {0.0}
    assert values(first) == {0.0}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("onto", [(), (3,), (2, 4)], ids=str)
def test_a_load_whose_reply_was_lost_does_not_come_back_over_a_later_one(
    targets: list[str],
    stack: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    onto: tuple[int, ...],
    shards: int,
) -> None:
    workers = Workers(stack, targets, shards=shards, aggregation=ASYNC, optimizer=SGD).join_all()
    first, second, _ = workers.sessions
    for session in (first, second):
        session.attach()
    send, sent = pull_and_load.send_load, list[Any]()

    def lost(*given: Any) -> Any:
        sent.append(send(*given))
        if len(sent) < shards:
            return sent[-1]
        monkeypatch.setattr(pull_and_load, "send_load", send)
        second.load(filled(2000.0))
        if onto:
            workers.move(*onto)
        raise stepwire.UnavailableError("the reply was lost", reason=stepwire.Reason.UNREACHABLE)

    monkeypatch.setattr(pull_and_load, "send_load", lost)
    first.load(filled(1000.0))
    assert values(second) == {2000.0}
    with pytest.raises(stepwire.StepMismatchError, match="another worker loaded it"):
        first.step(ONES)
    assert values(first) == {2000.0}
    first.step(ONES)
    assert values(second) == {1999.0}


def test_a_load_behind_one_that_failed_before_a_move_is_another_one(
    targets: list[str], stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(stack, targets, aggregation=ASYNC, optimizer=SGD).join_all()
    first, second, _ = workers.sessions
    first.attach()
    send = pull_and_load.send_load

    def interrupted(*given: Any) -> Any:
        send(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pull_and_load, "send_load", interrupted)
        first.load(filled(1000.0))
    workers.move(3)
    first.load(filled(2000.0))
    assert values(second) == {2000.0}


@pytest.mark.parametrize("policy", ["allow", "reject"], ids=["alone", "decided together"])
def test_workers_that_step_and_load_at_once_leave_one_state(
    targets: list[str], stack: contextlib.ExitStack, policy: str
) -> None:
    """Whatever meets whatever: the shards are of one load whenever they are read, and alike in the end."""
    options = {"aggregation": ASYNC, "optimizer": SGD, "non_finite": policy}
    workers = Workers(stack, targets, shards=2, **options).join_all()
    begun = threading.Barrier(WORKERS)

    def work(worker: int) -> int:
        session, chance = workers.sessions[worker], random.Random(worker)
        begun.wait(60.0)
        made = 0
        for number in range(12):
            if chance.random() < 0.3:
                session.load(filled(float(10_000 * (1 + worker + WORKERS * number))))
                made += 1
                continue
            try:
                session.step(ONES)
            except (stepwire.StepMismatchError, stepwire.StateChangedError):
                assert len({np.ceil(value / 10_000) for value in values(session)}) == 1
        return made

    made = together(*(functools.partial(work, worker) for worker in range(WORKERS)))
    assert min(made) > 0
    for session in workers.sessions:
        assert len(values(session)) == 1
        session.step(ONES)
    first, second = (shard.info(shard.deadline(None)) for shard in workers.sessions[0]._link.shards)
    assert (first.applied_step, first.members) == (second.applied_step, second.members)
    assert min(session.statistics().applied_load for session in workers.sessions) >= 1 + sum(made)
