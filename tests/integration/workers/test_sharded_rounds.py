"""Several workers of one model that is cut over several servers: the bits of one worker on one server."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import pytest

import stepwire
from stepwire.sharding.coordinator import Coordinator
from tests.integration.workers.together import exact_mean, gradients, together
from tests.support.numpy_server import numpy_server

WORKERS, STEPS = 3, 3
ZEROS = {"w": np.zeros(200_000, np.float32)}
GIVEN = gradients(WORKERS, STEPS, 200_000)
ADAM = stepwire.AdamW(lr=0.1)


@pytest.fixture(scope="module")
def targets() -> Iterator[list[str]]:
    with numpy_server() as first, numpy_server() as second:
        yield [first.target, second.target]


def joined(targets: list[str], stack: contextlib.ExitStack, **options: Any) -> list[Any]:
    shared = {"optimizer": ADAM, "request_id": uuid.uuid4().hex} | options
    clients = [stack.enter_context(stepwire.connect(targets)) for _ in range(WORKERS)]
    return [client.create_session(ZEROS, worker=worker, **shared) for worker, client in enumerate(clients)]


@pytest.mark.parametrize("treatment", [{"clip_grad_norm": 0.5}, {"non_finite": "skip"}, {"non_finite": "allow"}])
def test_shards_of_several_workers_give_the_bits_of_one_worker(targets: list[str], treatment: dict[str, Any]) -> None:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(stepwire.connect(targets[0]))
        alone: Any = client.create_session(ZEROS, optimizer=ADAM, **treatment)
        sessions = joined(targets, stack, aggregation=stepwire.Aggregation(workers=WORKERS), **treatment)
        assert [len(session.shards) for session in sessions] == [2] * WORKERS
        for step in range(STEPS):
            expected = alone.step(exact_mean([worker[step] for worker in GIVEN]))["w"].tobytes()
            calls = [functools.partial(session.step, GIVEN[worker][step]) for worker, session in enumerate(sessions)]
            assert [found["w"].tobytes() for found in together(*calls)] == [expected] * WORKERS
        for session in sessions:
            result = session.last_result
            assert (result.step, result.round.contribution, result.round.dropped) == (STEPS, STEPS, False)
            assert result.grad_norm == alone.last_result.grad_norm
            norms = [float(np.float32(np.linalg.norm(GIVEN[worker][-1]["w"].astype(float)))) for worker in range(3)]
            assert [each.grad_norm for each in result.round.contributors] == pytest.approx(norms, rel=1e-6)


def test_asynchronous_steps_of_shards_are_numbered_by_each_worker_for_itself(targets: list[str]) -> None:
    with contextlib.ExitStack() as stack:
        aggregation = stepwire.Aggregation(workers=WORKERS, mode="async")
        sessions = joined(targets, stack, aggregation=aggregation, clip_grad_norm=0.5)
        for step in range(STEPS):
            together(*(functools.partial(session.step, GIVEN[k][step]) for k, session in enumerate(sessions)))
        assert [session.last_result.round.contribution for session in sessions] == [STEPS] * WORKERS
        assert sessions[0].info().applied_step == WORKERS * STEPS


def test_what_shards_cannot_agree_on_is_refused_by_name(targets: list[str]) -> None:
    with stepwire.connect(targets) as client:
        few = stepwire.Aggregation(workers=3, required_workers=2)
        with pytest.raises(stepwire.InvalidRequestError, match="required_workers"):
            client.create_session(ZEROS, aggregation=few, clip_grad_norm=1.0)
        with pytest.raises(stepwire.InvalidRequestError, match="worker"):
            client.create_session(ZEROS, aggregation=stepwire.Aggregation(workers=3), worker="any")


class Dead(Exception):
    """The end of a worker between the two phases."""


def test_a_worker_that_fails_between_the_phases_gets_the_answer_of_the_round(targets: list[str]) -> None:
    """The others have every check, and decide without it."""
    with contextlib.ExitStack() as stack:
        sessions = joined(targets, stack, aggregation=stepwire.Aggregation(workers=WORKERS), clip_grad_norm=0.5)

        def decide(*_: object) -> NoReturn:
            raise Dead

        def fail() -> None:
            with pytest.raises(Dead):
                sessions[1].step(GIVEN[1][0])

        with pytest.MonkeyPatch.context() as patched:
            dying = Coordinator(1, 2, sessions[1]._link._link._bounds)
            patched.setattr(dying, "decide", decide)
            patched.setattr(sessions[1]._link._link, "_coordinator_of", lambda step: dying)
            first, _, third = together(
                lambda: sessions[0].step(GIVEN[0][0]), fail, lambda: sessions[2].step(GIVEN[2][0])
            )
        again = sessions[1].step(GIVEN[1][0])
        assert first["w"].tobytes() == again["w"].tobytes() == third["w"].tobytes()
        results = [session.last_result for session in sessions]
        assert [(each.step, each.round.contribution, each.round.dropped) for each in results] == [(1, 1, False)] * 3
        found = together(*(functools.partial(each.step, GIVEN[worker][1]) for worker, each in enumerate(sessions)))
        assert len({each["w"].tobytes() for each in found}) == 1
        assert {session.last_result.grad_norm for session in sessions} == {sessions[0].last_result.grad_norm}
