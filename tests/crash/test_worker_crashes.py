"""Servers that are killed at named points while several workers train: the bits of a run without a crash.

The suite tries some points once. `make crash-test SEEDS=20` tries every point so often, with other draws.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import random
from typing import Any

import numpy as np
import pytest

import stepwire
from tests.crash.crashing_server import POINTS, WORKER_POINTS
from tests.crash.test_crashes import SEEDS, Supervised
from tests.integration.proxy import Proxy
from tests.integration.workers.together import exact_mean, gradients, together
from tests.support.numpy_server import numpy_server

pytestmark = [pytest.mark.slow, pytest.mark.many]

WORKERS, STEPS, SIZE = 4, 8, 30_000
ZEROS = {"w": np.zeros(SIZE, np.float32)}
GIVEN = gradients(WORKERS, STEPS, SIZE)
ADAM = stepwire.AdamW(lr=0.1)
SOME = ("after contribute", "before reduce", "after append commit", "after round")
"""The points of the suite."""


@pytest.fixture(scope="module")
def expected() -> list[bytes]:
    """The parameters after each step of one worker that is fed the exact mean."""
    with numpy_server() as server, stepwire.connect(server.target) as client:
        session: Any = client.create_session(ZEROS, optimizer=ADAM)
        means = [exact_mean([worker[step] for worker in GIVEN]) for step in range(STEPS)]
        return [session.step(mean)["w"].tobytes() for mean in means]


def joined(stack: contextlib.ExitStack, target: str, case: str, aggregation: stepwire.Aggregation) -> list[Any]:
    retry = stepwire.Retry(initial_seconds=0.01, max_seconds=0.1)
    shared: dict[str, Any] = {"optimizer": ADAM, "aggregation": aggregation, "request_id": case.replace(" ", "-")}
    shared["durability"] = stepwire.Durability(level="journal", every_steps=random.Random(case).choice([2, 3, 100]))
    sessions = []
    for worker in range(WORKERS):
        client = stack.enter_context(stepwire.connect(target, transport="tcp", timeout=60.0, retry=retry))
        sessions.append(client.create_session(ZEROS, worker=worker, **shared))
    return sessions


CASES = [(point, seed) for point in ((*POINTS, *WORKER_POINTS) if SEEDS else SOME) for seed in range(SEEDS or 1)]


@pytest.mark.parametrize(("point", "seed"), CASES)
def test_rounds_go_on_on_the_next_server(point: str, seed: int, expected: list[bytes], tmp_path: pathlib.Path) -> None:
    case = f"{point} {seed}"
    count = random.Random(case).choice([1, 2, 3, 5, 8, 13])
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(Proxy("127.0.0.1:1"))
        supervised = stack.enter_context(Supervised(proxy, tmp_path, point, count))
        sessions = joined(stack, proxy.target, case, stepwire.Aggregation(workers=WORKERS))
        for step in range(STEPS):
            calls = [functools.partial(session.step, GIVEN[worker][step]) for worker, session in enumerate(sessions)]
            assert [found["w"].tobytes() for found in together(*calls)] == [expected[step]] * WORKERS, step
            parts = [session.last_result.round for session in sessions]
            assert [(part.contribution, part.dropped) for part in parts] == [(step + 1, False)] * WORKERS
        assert supervised.starts <= 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_dropped_contribution_is_answered_once(when: str, tmp_path: pathlib.Path) -> None:
    """A round takes the first two; the late ones are answered by the server after the crash."""
    aggregation = stepwire.Aggregation(workers=WORKERS, required_workers=2, least_grace=0.0, most_grace=0.0)
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(Proxy("127.0.0.1:1"))
        stack.enter_context(Supervised(proxy, tmp_path, f"{when} drop", 1))
        sessions = joined(stack, proxy.target, f"dropped {when}", aggregation)
        for session in sessions:
            session.attach()
        together(*(functools.partial(sessions[worker].step, GIVEN[worker][0]) for worker in (0, 1)))
        late = [sessions[worker].step(GIVEN[worker][0])["w"].tobytes() for worker in (2, 3)]
        assert late == [sessions[0].pull()["w"].tobytes()] * 2
        assert [sessions[worker].last_result.round.dropped for worker in (2, 3)] == [True, True]
        together(*(functools.partial(sessions[worker].step, GIVEN[worker][1]) for worker in (2, 3)))
        parts = [sessions[worker].last_result.round for worker in (2, 3)]
        assert [(part.contribution, part.dropped) for part in parts] == [(2, False)] * 2
        assert sessions[0].info().applied_step == 2
