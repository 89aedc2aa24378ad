"""Rows by ids of several workers: rounds and asynchronous steps as one worker makes them, full tables, restarts."""

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
from stepwire import Rows, Table
from tests.integration.durability.test_losses import Restarting
from tests.integration.workers.together import joined, together
from tests.support.lost_replies import lost_replies
from tests.support.numpy_server import numpy_server

WIDTH = 3
ADAM = stepwire.Adam(lr=0.1)
POOL = np.random.default_rng(3).integers(0, 2**63, 30, dtype=np.int64)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with numpy_server() as server:
        yield server.target


def hashed(capacity: int = 40, **more: Any) -> dict[str, Table]:
    return {"t": Table((capacity, WIDTH), "skipped", 0.5, 11, hashed=True, **more)}


def options(**aggregation: Any) -> dict[str, Any]:
    way = stepwire.Aggregation(**{"workers": 2, "reduction": "sum"} | aggregation)
    return {"optimizer": ADAM, "aggregation": way, "request_id": uuid.uuid4().hex}


def drawn(worker: int, step: int, among: int = len(POOL)) -> Rows:
    """Draw gradients of a few bits, whose sums are exact."""
    rng = np.random.default_rng([worker, step])
    return Rows(rng.choice(POOL[:among], 6), (rng.integers(-99, 100, (6, WIDTH)) / 8).astype(np.float32))


def joint(given: list[Rows]) -> Rows:
    return Rows(np.concatenate([each.indices for each in given]), np.concatenate([each.values for each in given]))


@contextlib.contextmanager
def alone(target: str, tables: dict[str, Table], steps: list[Rows]) -> Iterator[stepwire.Session]:
    with stepwire.connect(target) as client, client.create_session(tables, optimizer=ADAM) as session:
        for rows in steps:
            session.step({"t": rows})
        yield session


def values_of(session: stepwire.Session) -> tuple[list[Any], Any]:
    pulled: Any = session.pull(rows={"t": POOL})
    return pulled["t"].values.tolist(), session.info().tables


def test_a_round_steps_the_union_of_the_ids(target: str) -> None:
    """Rows give way between rounds as they do for one worker."""
    tables = hashed(20, max_age_steps=1)
    shared = options()
    sessions = [joined(target, tables, worker, **shared) for worker in range(2)]
    steps = []
    for step in range(6):
        given = [drawn(worker, step) for worker in range(2)]
        steps.append(joint(given))
        calls = [functools.partial(each.step, {"t": own}) for each, own in zip(sessions, given, strict=True)]
        replies: list[Any] = together(*calls)
        pulled: Any = sessions[1].pull(rows={"t": POOL})
        now = dict(zip(POOL.tolist(), pulled["t"].values.tolist(), strict=True))
        for reply, own in zip(replies, given, strict=True):
            assert reply["t"].indices.tolist() == np.unique(own.indices).tolist()
            assert reply["t"].values.tolist() == [now[each] for each in reply["t"].indices.tolist()]
    with alone(target, tables, steps) as one:
        assert values_of(sessions[0]) == values_of(one)
        assert one.info().tables[0].evicted_rows > 0


def test_a_full_table_ends_the_round_for_all_and_makes_no_row(target: str) -> None:
    shared = options()
    sessions = [joined(target, hashed(7), worker, **shared) for worker in range(2)]
    given = [Rows(POOL[4 * worker : 4 * worker + 4], np.ones((4, WIDTH), np.float32)) for worker in range(2)]

    def refused(worker: int) -> int:
        with pytest.raises(stepwire.ResourceExhaustedError, match="0 of 7 rows, and 8 ids are new") as told:
            sessions[worker].step({"t": given[worker]})
        return int(told.value.metadata["new_rows"])

    assert together(*(functools.partial(refused, worker) for worker in range(2))) == [8, 8]
    assert sessions[0].info().tables[0].rows == 0
    together(*(functools.partial(each.step, {"t": given[0]}) for each in sessions))
    with alone(target, hashed(7), [joint([given[0], given[0]])]) as one:
        assert values_of(sessions[1]) == values_of(one)


def test_a_late_worker_gets_first_values_of_ids_that_nobody_stepped(target: str) -> None:
    shared = options(workers=3, required_workers=2, most_grace=0.0, least_grace=0.0)
    sessions = [joined(target, hashed(), worker, **shared) for worker in range(3)]
    for session in sessions:
        session.attach()
    given = [drawn(worker, 0, among=8) for worker in range(2)]
    together(*(functools.partial(each.step, {"t": own}) for each, own in zip(sessions, given, strict=False)))
    late: Any = sessions[2].step({"t": Rows(POOL[::-1], np.ones((len(POOL), WIDTH), np.float32))})
    assert sessions[2].last_result is not None and sessions[2].last_result.round is not None
    assert sessions[2].last_result.round.dropped
    with alone(target, hashed(), [joint(given)]) as one:
        assert values_of(sessions[2]) == values_of(one)
        wanted: Any = one.pull(rows={"t": np.sort(POOL)})
        assert late["t"].values.tolist() == wanted["t"].values.tolist()


def test_asynchronous_steps_make_rows_as_they_come(target: str) -> None:
    shared = options(mode="async", reduction="mean")
    sessions = [joined(target, hashed(), worker, **shared) for worker in range(2)]
    given = [drawn(step % 2, step) for step in range(4)]
    for step, rows in enumerate(given):
        if step == 2:
            with lost_replies(), pytest.raises(stepwire.DeadlineExceededError):
                sessions[0].step({"t": rows})
        sessions[step % 2].step({"t": rows})
    with alone(target, hashed(), given) as one:
        assert values_of(sessions[0]) == values_of(one)


@pytest.mark.parametrize("durability", ["journal", "checkpoint"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ids_of_workers_survive_a_restart(tmp_path: pathlib.Path, durability: str, mode: str) -> None:
    tables = hashed(20, max_age_steps=1)
    with contextlib.ExitStack() as stack:
        restarting = Restarting(tmp_path, stack)
        shared = options(mode=mode, reduction="sum" if mode == "sync" else "mean") | {"durability": durability}
        retry = stepwire.Retry(initial_seconds=0.001, max_seconds=0.01)
        clients = [stack.enter_context(stepwire.connect(restarting.target, timeout=120.0, retry=retry)) for _ in "ab"]
        sessions = [each.create_session(tables, worker=worker, **shared) for worker, each in enumerate(clients)]
        given = [[drawn(worker, step) for worker in range(2)] for step in range(5)]
        for step, rows in enumerate(given):
            calls = [functools.partial(each.step, {"t": own}) for each, own in zip(sessions, rows, strict=True)]
            _ = together(*calls) if mode == "sync" else [call() for call in calls]
            if step in (1, 3):
                if durability == "checkpoint":
                    sessions[0].save_checkpoint(f"step-{step}")
                restarting.crash(restarting.image())
        steps = [joint(rows) for rows in given] if mode == "sync" else [own for rows in given for own in rows]
        with alone(restarting.target, tables, steps) as one:
            assert values_of(sessions[0])[0] == values_of(one)[0]
