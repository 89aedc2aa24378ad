"""Servers with an object store, killed at named points: another machine finds a state that was, or none yet."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

import stepwire
from tests.crash.crashing_server import STORE_POINTS
from tests.crash.test_crashes import SEEDS, STEPS, Case, Supervised, bits, gradient, parameters, undisturbed
from tests.integration.proxy import Proxy
from tests.support.numpy_server import numpy_server

pytest.importorskip("obstore", reason="obstore is not installed: pip install obstore")
pytestmark = [pytest.mark.slow, pytest.mark.many]

SOME = ("after upload", "before store delete")
"""The points of the suite."""


@pytest.fixture(scope="module")
def expected() -> list[bytes]:
    return [bits(parameters()), *undisturbed()]


POINTS = STORE_POINTS[:: 3 if SEEDS == 1 else 1] if SEEDS else SOME
CASES = [Case(point, seed) for point in POINTS for seed in range(SEEDS or 1)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.point}-{case.seed}")
def test_another_machine_finds_a_state_that_was(case: Case, expected: list[bytes], tmp_path: pathlib.Path) -> None:
    draw, store = case.draw, f"file://{tmp_path}/store"
    count = draw.choice([1, 2, 3, 5, 8])
    durability = stepwire.Durability(level=draw.choice(["journal", "checkpoint"]), every_steps=draw.choice([1, 2, 3]))
    retry = stepwire.Retry(initial_seconds=0.01, max_seconds=0.1)
    with Proxy("127.0.0.1:1") as proxy, Supervised(proxy, tmp_path / "one", case.point, count, store) as supervised:
        with stepwire.connect(proxy.target, timeout=60.0, retry=retry, window_bytes=16 << 20) as client:
            session = client.create_session(parameters(), durability=durability, keep=True)
            durable = 0
            for number in range(1, STEPS + 1):
                assert bits(session.step(gradient(number))) == expected[number], number
                durable = session.last_result.durable_step if session.last_result is not None else 0
            session_id = session.session_id
        assert supervised.starts <= 3
    least = durable if durability.level == "checkpoint" and durable else -1
    with numpy_server(data_dir=str(tmp_path / "two"), checkpoint_store=store) as other:
        with stepwire.connect(other.target) as client:
            assert found(client, session_id, expected) >= least
    with numpy_server(data_dir=str(tmp_path / "three"), checkpoint_store=store) as third:
        with stepwire.connect(third.target) as client:
            assert found(client, session_id, expected) >= least


def found(client: stepwire.Client, session_id: str, expected: list[bytes]) -> int:
    """Return the step at which a session is, with the parameters of that step; -1 if the store never had it."""
    if not list(client.sessions()):
        return -1
    session: Any = client.session(session_id)
    assert bits(session.pull()) == expected[session.applied_step]
    return int(session.applied_step)
