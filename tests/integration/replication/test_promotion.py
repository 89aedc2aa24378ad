"""A standby is promoted: whatever its primary was about to do, each step is applied once, bit for bit."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import msgspec
import pytest

import stepwire
from stepwire.wire.directory import ShardDirectory
from tests.integration.replication.pair import Pair, gradient, pair_in, undisturbed

pytestmark = pytest.mark.many

STEPS = 4


def fail_over(pair: Pair) -> None:
    pair.kill(pair.primary)
    pair.standby.replication.promote()


@functools.cache
def expected() -> list[bytes]:
    return undisturbed(STEPS)


@pytest.mark.parametrize("admitted", [True, False], ids=["acknowledgement lost", "record lost"])
@pytest.mark.parametrize("at", range(6))
def test_a_primary_that_is_killed_at_any_record_loses_and_doubles_no_step(
    tmp_path: pathlib.Path, at: int, admitted: bool
) -> None:
    """Records from the second step on: a chunk and a commit for each."""
    with pair_in(tmp_path) as pair, stepwire.connect(pair.target, timeout=120.0) as client:
        session = pair.create(client)
        replies = [session.step(gradient(0))["w"].tobytes()]
        done = pair.intercept(at, lambda: fail_over(pair), admitted=admitted)
        replies += [session.step(gradient(step))["w"].tobytes() for step in range(1, STEPS)]
        assert done.is_set()
        assert replies == expected()
        info = session.info()
        assert (info.applied_step, info.epoch) == (STEPS, 3)
        entry = ShardDirectory(tmp_path).entry("a")
        assert entry[:2] == (3, pair.standby.target)
        assert all(step <= STEPS for step in entry.durable_steps.values()) and len(entry.durable_steps) == 1


@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_steps_that_overlap_and_accumulate_are_followed_too(tmp_path: pathlib.Path, transport: str) -> None:
    options: dict[str, Any] = {"accumulation_steps": 2, "clip_grad_norm": 1.0}
    with pair_in(tmp_path) as pair, stepwire.connect(pair.target, timeout=120.0, transport=transport) as client:
        session = pair.create(client, **options)
        replies = [session.step(gradient(step))["w"].tobytes() for step in range(3)]
        fail_over(pair)
        replies += [session.step(gradient(step))["w"].tobytes() for step in range(3, 6)]
        assert replies == undisturbed(6, **options)


def test_a_drain_hands_over(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair, stepwire.connect(pair.target, timeout=120.0) as client:
        session = pair.create(client)
        replies = [session.step(gradient(step))["w"].tobytes() for step in range(2)]
        assert pair.primary.drain()
        pair.primary.close()
        replies += [session.step(gradient(step))["w"].tobytes() for step in range(2, STEPS)]
        assert replies == expected()


def test_a_standby_is_promoted_by_itself_after_its_time_and_not_before(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair:
        replication = pair.standby.replication
        replication._without_primary(1e6)
        assert replication.status().role == "standby", "it is not the setting"
        replication._config = msgspec.structs.replace(replication._config, promote_after_seconds=30)
        replication._without_primary(29.9)
        assert replication.status().role == "standby"
        replication._without_primary(30.0)
        assert replication.status().role == "primary"


def test_a_promoted_standby_has_a_standby_of_its_own(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair, stepwire.connect(pair.target, timeout=120.0) as client:
        session = pair.create(client)
        replies = [session.step(gradient(0))["w"].tobytes()]
        fail_over(pair)
        replies.append(session.step(gradient(1))["w"].tobytes())
        assert session.info().durable_step == 0, "it is alone"
        pair.primary = pair.standby
        pair.standby = pair.follow()
        replies.append(session.step(gradient(2))["w"].tobytes())
        assert session.info().durable_step == 3
        fail_over(pair)
        replies.append(session.step(gradient(3))["w"].tobytes())
        assert replies == expected()
        assert session.info().epoch == 5


def test_a_session_that_ends_ends_on_the_standby_too(tmp_path: pathlib.Path) -> None:
    with pair_in(tmp_path) as pair, stepwire.connect(pair.target, timeout=120.0) as client:
        closed, kept = pair.create(client), pair.create(client)
        kept.step(gradient(0))
        closed.close()
        fail_over(pair)
        assert [each.session_id for each in client.sessions()] == [kept.session_id]
