"""Servers that are killed at named points while clients train: no acknowledged step is lost or doubled.

The suite tries some points once. `make crash-test SEEDS=20` tries every point so often, with other draws.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import stepwire
from stepwire.errors import Reason
from tests.crash.crashing_server import POINTS, CrashingServer
from tests.integration.proxy import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.many]

SEEDS = int(os.environ.get("STEPWIRE_CRASH_SEEDS", "0"))
SOME = ("before receive", "after apply", "after append commit", "before manifest")
"""The points of the suite."""

STEPS = 12
SHAPES = {"a": (150, 200), "b": (7,)}


class Supervised:
    """A server that is started again, without crash points, whenever it has died. A context manager."""

    def __init__(self, proxy: Proxy, data_dir: pathlib.Path, point: str, count: int, store: str = "") -> None:
        """Start a server that dies at a point."""
        self.starts = 0
        self._store = store
        self._proxy, self._data_dir = proxy, data_dir
        self._point, self._count = point, count
        self._ended = False
        self._process: CrashingServer | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended:
            point = self._point if not self.starts else ""
            self.starts += 1
            process = self._process = CrashingServer(self._data_dir, point, self._count, self._store)
            if process.port is not None:
                self._proxy.upstream = f"127.0.0.1:{process.port}"
                self._up.set()
            if self._ended:  # the block ended while this one started
                process.kill()
            process.wait()

    def __enter__(self) -> Supervised:
        self._thread.start()
        self._up.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        assert self._process is not None
        self._process.kill()
        self._thread.join()


class Case(NamedTuple):
    """A crash: its point, how often the point is passed before it, and the session that meets it."""

    point: str
    seed: int

    @property
    def draw(self) -> random.Random:
        """The draw of the case."""
        return random.Random(f"{self.point} {self.seed}")


def gradient(number: int) -> dict[str, Any]:
    draw = np.random.default_rng((3, number))
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def parameters() -> dict[str, Any]:
    return {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def undisturbed() -> list[bytes]:
    """Return the parameters after each step of a run without a crash, by the same server in this process."""
    from tests.support.numpy_server import numpy_server

    with numpy_server() as server, stepwire.connect(server.target) as client:
        session = client.create_session(parameters())
        return [bits(session.step(gradient(number))) for number in range(1, STEPS + 1)]


def bits(arrays: Any) -> bytes:
    return b"".join(arrays[name].tobytes() for name in sorted(arrays))


@pytest.fixture(scope="module")
def expected() -> list[bytes]:
    return undisturbed()


CASES = [Case(point, seed) for point in (POINTS if SEEDS else SOME) for seed in range(SEEDS or 1)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.point}-{case.seed}")
def test_no_acknowledged_step_is_lost_or_doubled(case: Case, expected: list[bytes], tmp_path: pathlib.Path) -> None:
    draw = case.draw
    count = draw.choice([1, 2, 3, 5, 8, 13, 21, 34])
    durability = stepwire.Durability(level="journal", every_steps=draw.choice([2, 3, 100]))
    options: dict[str, Any] = draw.choice([{}, {"overlap": True}])
    transport = draw.choice(["tcp", "uds", "auto"])
    retry = stepwire.Retry(initial_seconds=0.01, max_seconds=0.1)
    with Proxy("127.0.0.1:1") as proxy, Supervised(proxy, tmp_path, case.point, count) as supervised:
        with stepwire.connect(proxy.target, transport=transport, timeout=60.0, retry=retry) as client:
            session = client.create_session(parameters(), durability=durability, non_finite="allow", keep=True)
            for number in range(1, STEPS + 1):
                assert bits(session.step(gradient(number), **options)) == expected[number - 1], number
                assert session.last_result is not None
                assert (session.last_result.step, session.last_result.durable_step) == (number, number)
            assert session.info().applied_step == STEPS
        assert supervised.starts <= 3


@contextlib.contextmanager
def server_on(data_dir: pathlib.Path) -> Iterator[CrashingServer]:
    """Run a server without crash points for a block, and kill it."""
    process = CrashingServer(data_dir)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_server_that_was_stopped_and_goes_on_answers_nothing(tmp_path: pathlib.Path) -> None:
    """Another server acquires the directory while the first one is paused."""
    with server_on(tmp_path) as old, stepwire.connect(f"127.0.0.1:{old.port}", timeout=20.0) as client:
        session = client.create_session(parameters(), durability="journal", keep=True)
        session.step(gradient(1))
        old.send_signal(signal.SIGSTOP)
        with server_on(tmp_path) as new, stepwire.connect(f"127.0.0.1:{new.port}") as other:
            again = other.session(session.own_id)
            values = bits(again.step(gradient(2)))
            old.send_signal(signal.SIGCONT)
            for act in (lambda: session.step(gradient(2)), session.pull, session.state):
                with pytest.raises(stepwire.FencedError) as fenced:
                    act()
                assert fenced.value.reason == Reason.NOT_PRIMARY
            assert (again.applied_step, bits(again.pull())) == (2, values)
