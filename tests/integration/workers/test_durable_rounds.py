"""Several workers of a server that dies: with a journal they go on with the bits of an undisturbed run."""

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
from tests.integration.workers.together import exact_mean, gradients, together
from tests.support.numpy_server import numpy_server

WORKERS, STEPS = 3, 4
ZEROS = {"w": np.zeros(30_000, np.float32)}
GIVEN = gradients(WORKERS, STEPS, 30_000)
"""Larger than a message, and than a chunk that waits in memory for its commit."""

ADAM = stepwire.AdamW(lr=0.1)


@pytest.fixture
def restarting(tmp_path: pathlib.Path) -> Iterator[Restarting]:
    with contextlib.ExitStack() as stack:
        yield Restarting(tmp_path, stack)


@pytest.fixture(scope="module")
def expected() -> list[bytes]:
    """The parameters after each step of one worker that is fed the exact mean."""
    with numpy_server() as server, stepwire.connect(server.target) as client:
        session: Any = client.create_session(ZEROS, optimizer=ADAM, clip_grad_norm=1.0)
        means = [exact_mean([worker[step] for worker in GIVEN]) for step in range(STEPS)]
        return [session.step(mean)["w"].tobytes() for mean in means]


def joined(target: str, stack: contextlib.ExitStack, **options: Any) -> list[Any]:
    retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
    shared = {"optimizer": ADAM, "request_id": uuid.uuid4().hex} | options
    clients = [stack.enter_context(stepwire.connect(target, timeout=120.0, retry=retry)) for _ in range(WORKERS)]
    return [client.create_session(ZEROS, worker=worker, **shared) for worker, client in enumerate(clients)]


def stepped(sessions: list[Any], step: int) -> list[bytes]:
    calls = [functools.partial(session.step, GIVEN[worker][step]) for worker, session in enumerate(sessions)]
    return [found["w"].tobytes() for found in together(*calls)]


@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
def test_workers_go_on_on_the_next_server(restarting: Restarting, expected: list[bytes], durability: str) -> None:
    with contextlib.ExitStack() as stack:
        sessions = joined(
            restarting.target,
            stack,
            durability=durability,
            clip_grad_norm=1.0,
            aggregation=stepwire.Aggregation(workers=WORKERS),
        )
        assert stepped(sessions, 0) == [expected[0]] * WORKERS
        assert stepped(sessions, 1) == [expected[1]] * WORKERS
        if durability == "checkpoint":
            restarting.checkpoint(sessions[0])
        restarting.crash(restarting.image())
        assert stepped(sessions, 2) == [expected[2]] * WORKERS
        assert [session.last_result.round.contribution for session in sessions] == [3] * WORKERS
        assert stepped(sessions, 3) == [expected[3]] * WORKERS


def test_a_server_knows_what_each_worker_had_answered_and_one_that_knows_less_is_refused(
    restarting: Restarting, expected: list[bytes]
) -> None:
    with contextlib.ExitStack() as stack:
        aggregation = stepwire.Aggregation(workers=WORKERS)
        sessions = joined(restarting.target, stack, durability="journal", clip_grad_norm=1.0, aggregation=aggregation)
        assert stepped(sessions, 0) == [expected[0]] * WORKERS
        before = restarting.image()
        assert stepped(sessions, 1) == [expected[1]] * WORKERS
        after = restarting.image()
        restarting.crash(after)
        found = sessions[2].info()
        assert (found.applied_step, [member.contribution for member in found.members]) == (2, [2, 2, 2])
        assert stepped(sessions, 2) == [expected[2]] * WORKERS
        restarting.crash(before)
        with pytest.raises(stepwire.DataLossError):
            sessions[0].step(GIVEN[0][3])


def test_asynchronous_steps_are_made_again_with_their_learning_rates(restarting: Restarting) -> None:
    with contextlib.ExitStack() as stack:
        aggregation = stepwire.Aggregation(workers=WORKERS, mode="async", staleness_correction=True)
        sessions = joined(restarting.target, stack, durability="journal", aggregation=aggregation)
        for step in range(2):
            for worker, session in enumerate(sessions):
                session.step(GIVEN[worker][step])
        last = sessions[-1].pull()["w"].tobytes()
        restarting.crash(restarting.image())
        assert sessions[0].pull()["w"].tobytes() == last
        assert [member.contribution for member in sessions[0].info().members] == [2, 2, 2]
        sessions[1].step(GIVEN[1][2])
        result = sessions[1].last_result
        assert (result.step, result.round.contribution, result.round.staleness) == (7, 3, 1)
