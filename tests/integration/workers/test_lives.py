"""Sessions of several workers that are parked, or lost with their server: each worker's numbers go on."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from tests.integration.durability.test_losses import Restarting
from tests.integration.workers.together import gradients, together

SIZE = 30_000
ZEROS = {"w": np.zeros(SIZE, np.float32)}
GIVEN = gradients(3, 4, SIZE)
AT_ONCE = stepwire.Aggregation(workers=3, required_workers=2, least_grace=0.0, most_grace=0.0)
"""A round ends with its second gradient."""


@pytest.fixture
def restarting(tmp_path: pathlib.Path) -> Iterator[Restarting]:
    with contextlib.ExitStack() as stack:
        yield Restarting(tmp_path, stack)


def joined(target: str, stack: contextlib.ExitStack, aggregation: stepwire.Aggregation, durability: str) -> list[Any]:
    shared: dict[str, Any] = {"optimizer": stepwire.SGD(lr=1.0), "request_id": uuid.uuid4().hex}
    shared |= {"aggregation": aggregation, "durability": durability}
    retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
    sessions = []
    for worker in range(aggregation.workers):
        client = stack.enter_context(stepwire.connect(target, timeout=120.0, retry=retry))
        sessions.append(client.create_session(ZEROS, worker=worker, **shared))
        sessions[-1].attach()
    return sessions


def left(restarting: Restarting, sessions: list[Any], how: str) -> None:
    """Have the session leave memory: its server dies, or parks it."""
    if how == "crash":
        restarting.crash(restarting.image())
        return
    registry = restarting.server.registry
    for session in sessions:
        session.detach()
    session = registry.get(sessions[0].session_id)
    while session.ledger.attached:
        pass
    assert registry.park(session)


@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
@pytest.mark.parametrize("how", ["crash", "park"])
def test_the_only_worker_of_a_session_keeps_its_number(restarting: Restarting, durability: str, how: str) -> None:
    with contextlib.ExitStack() as stack:
        (session,) = joined(restarting.target, stack, stepwire.Aggregation(workers=1), durability)
        for gradient in GIVEN[0][:2]:
            session.step(gradient)
        restarting.checkpoint(session)
        left(restarting, [session], how)
        session.step(GIVEN[0][2])
        assert (session.last_result.step, session.last_result.round.contribution) == (3, 3)


@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
@pytest.mark.parametrize("how", ["crash", "park"])
def test_a_dropped_contribution_uses_its_number_up_for_good(restarting: Restarting, durability: str, how: str) -> None:
    with contextlib.ExitStack() as stack:
        sessions = joined(restarting.target, stack, AT_ONCE, durability)
        together(*(functools.partial(sessions[worker].step, GIVEN[worker][0]) for worker in (0, 1)))
        restarting.checkpoint(sessions[0])
        late = sessions[2].step(GIVEN[2][0])["w"]
        assert sessions[2].last_result.round.dropped
        left(restarting, sessions, how)
        found = together(*(functools.partial(sessions[worker].step, GIVEN[worker][1]) for worker in (0, 2)))
        part = sessions[2].last_result.round
        assert (sessions[2].last_result.step, part.contribution, part.dropped) == (2, 2, False)
        mean = (GIVEN[0][1]["w"].astype(np.float64) + GIVEN[2][1]["w"]) / 2
        np.testing.assert_array_equal(found[0]["w"], late - mean.astype(np.float32))
