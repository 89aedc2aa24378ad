"""Workers whose connections are cut anywhere: their rounds have the bits of a run whose connections held."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire_server.server import Server
from tests.integration.link import Cut
from tests.integration.proxy import Proxy
from tests.integration.workers.together import PATIENCE_SECONDS, exact_mean, gradients, joined, together
from tests.support.numpy_server import numpy_server

WORKERS = 3
ROUNDS = max(int(os.environ.get("STEPWIRE_WORKERS_EXAMPLES", "0")), 12)
ADAM = stepwire.AdamW(lr=0.1)
SIZES = {"one message": 300, "many messages": 40_000}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with numpy_server(max_chunk_bytes=16 << 10) as server:
        yield server


@pytest.fixture
def proxies(server: Server) -> Iterator[list[Proxy]]:
    """A network for each worker."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Proxy(server.target)) for _ in range(WORKERS)]


def cuts(chance: random.Random) -> list[Cut]:
    """Draw the cuts of one worker's round: the first one on the open connection, each other one on the next."""
    drawn = []
    for _ in range(chance.choice([0, 1, 1, 2])):
        direction = chance.choice(["up", "down"])
        unit = chance.choice(["frame", "message"])
        drawn.append(Cut(direction, unit, chance.randrange(3), chance.choice([0, 0, 5]), chance.random() < 0.5))
    return drawn


class Rounds:
    """The workers of one session, each in a thread that starts when it is told."""

    def __init__(self, targets: list[str], size: int, **options: Any) -> None:
        zeros = {"w": np.zeros(size, np.float32)}
        self.sessions: list[Any] = [joined(target, zeros, worker, **options) for worker, target in enumerate(targets)]
        for session in self.sessions:
            session.attach(transport="tcp")  # the others pass the proxies by

    def step(self, given: list[Any], chance: random.Random) -> list[bytes]:
        """Take a step together; the workers begin in a random order."""
        turns = [threading.Event() for _ in self.sessions]
        order = chance.sample(range(WORKERS), WORKERS)

        def work(worker: int) -> bytes:
            assert turns[worker].wait(PATIENCE_SECONDS)
            later = order[order.index(worker) + 1 :]
            if later:
                turns[later[0]].set()
            found: bytes = self.sessions[worker].step(given[worker], timeout=PATIENCE_SECONDS)["w"].tobytes()
            return found

        turns[order[0]].set()
        return together(*(lambda worker=worker: work(worker) for worker in range(WORKERS)))


@pytest.mark.parametrize("kind", SIZES)
def test_rounds_over_connections_that_are_cut(server: Server, proxies: list[Proxy], kind: str) -> None:
    size, chance = SIZES[kind], random.Random(f"{kind} {ROUNDS}")
    given = gradients(WORKERS, ROUNDS, size)
    options = {"optimizer": ADAM, "aggregation": stepwire.Aggregation(workers=WORKERS), "request_id": f"cuts-{size}"}
    together_ = Rounds([proxy.target for proxy in proxies], size, **options)
    with stepwire.connect(server.target) as client:
        alone: Any = client.create_session({"w": np.zeros(size, np.float32)}, optimizer=ADAM)
        for step in range(ROUNDS):
            parts = [worker[step] for worker in given]
            for proxy in proxies:
                if drawn := cuts(chance):
                    proxy.arm(*drawn)
            expected = alone.step(exact_mean(parts))["w"].tobytes()
            assert together_.step(parts, chance) == [expected] * WORKERS, step
            for worker, session in enumerate(together_.sessions):
                part = session.last_result.round
                assert (part.contribution, part.dropped) == (step + 1, False)
                assert [each.worker for each in part.contributors] == list(range(WORKERS)), worker
                proxies[worker].disarm()
    assert sum(proxy.cuts for proxy in proxies) >= ROUNDS // 2
