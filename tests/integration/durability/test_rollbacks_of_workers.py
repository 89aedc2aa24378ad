"""Several workers of one session: any of them rolls back, and all go on from the earlier state."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import shutil
import uuid
from typing import Any

import numpy as np
import pytest

import stepwire
from tests.integration.durability.test_recovery import server
from tests.integration.training import bits
from tests.integration.workers.together import together

ZEROS = {"w": np.zeros(5, np.float32)}
WAYS: dict[str, dict[str, Any]] = {
    "rounds": {},
    "async": {"mode": "async"},
    "bounded": {"mode": "async", "max_clock_lead": 1},
}


def stepped(sessions: list[Any], step: int) -> bytes:
    """Step with all workers, one after another where they need not meet, and return the parameters."""
    gradients = [{"w": np.full(5, (worker + 1) * step, np.float32)} for worker in range(len(sessions))]
    calls = [functools.partial(session.step, each) for session, each in zip(sessions, gradients, strict=True)]
    if sessions[0].config.aggregation.mode == "sync":
        together(*calls)
    else:
        for call in calls:
            call()
    return bits(sessions[0].pull())


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_any_worker_rolls_back_and_all_go_on_from_there(
    tmp_path: pathlib.Path, way: str, every: int, worker: int
) -> None:
    """With accumulation from the same place of it; and after a crash."""
    folder, name = tmp_path / "data", uuid.uuid4().hex
    options: dict[str, Any] = {
        "optimizer": stepwire.SGD(lr=1.0, momentum=0.5),
        "aggregation": stepwire.Aggregation(workers=2, **WAYS[way]),
        "accumulation_steps": every,
        "durability": "journal",
        "request_id": name,
    }
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(server(folder))
        clients = [stack.enter_context(stepwire.connect(running.target, transport="tcp")) for _ in range(2)]
        sessions = [clients[index].create_session(ZEROS, worker=index, **options) for index in range(2)]
        stepped(sessions, 1)
        saved = sessions[1 - worker].save_checkpoint("best")
        ahead = [stepped(sessions, step) for step in (2, 3, 4)]
        before = sessions[worker].info().applied_step
        earlier = sessions[worker].rollback(checkpoint="best")
        after = before + (saved.step - before) % every
        assert [session.info().applied_step for session in sessions] == [after] * 2
        assert bits(sessions[1 - worker].pull()) == bits(earlier)
        shutil.copytree(folder, crashed := tmp_path / "crashed")
        assert [stepped(sessions, step) for step in (2, 3, 4)] == ahead
    with server(crashed) as second, stepwire.connect(second.target, transport="tcp") as again:
        found = [again.create_session(ZEROS, worker=index, **options) for index in range(2)]
        assert [session.info().applied_step for session in found] == [after] * 2
        assert bits(found[0].pull()) == bits(earlier)
        assert [stepped(found, step) for step in (2, 3, 4)] == ahead


def test_a_worker_that_was_fenced_rolls_nothing_back(tmp_path: pathlib.Path) -> None:
    options: dict[str, Any] = {"aggregation": stepwire.Aggregation(workers=2, mode="async"), "durability": "checkpoint"}
    with server(tmp_path) as running, stepwire.connect(running.target, transport="tcp") as client:
        first = client.create_session(ZEROS, worker=0, request_id="one", **options)
        former, present = (client.create_session(ZEROS, worker=1, request_id="one", **options) for _ in range(2))
        former.step({"w": np.ones(5, np.float32)})
        first.save_checkpoint("best")
        present.attach(take_over=True)
        present.step({"w": np.ones(5, np.float32)})
        expected = bits(first.pull())
        with pytest.raises(stepwire.FencedError):
            former.rollback(checkpoint="best")
        assert bits(first.pull()) == expected
        assert bits(present.rollback(checkpoint="best")) == bits(first.pull()) != expected
