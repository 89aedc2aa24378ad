"""Histories of a model that moves between servers, on virtual time."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from stepwire_server.durability.moved import MovedSessions
from stepwire_server.sessions.freeze import Freeze
from stepwire_server.sessions.passage import Passage
from tests.simulation.history import Broken
from tests.simulation.move_history import MovingShape, moving_faults_of, moving_shape_of, run_moving

SMALL = MovingShape(servers=3, tensors=4, steps=6, two_phase=True, calls=1000)
WORKERS = SMALL._replace(workers=3, steps=4)


@pytest.fixture(autouse=True)
def _without_log() -> Iterator[None]:
    """Tasks of killed processes end in errors, which their code logs."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("shape", [SMALL, WORKERS], ids=["one", "workers"])
def test_the_same_seed_is_the_same_history_of_a_model_that_moves(shape: MovingShape) -> None:
    first = run_moving(3, shape, [])
    assert first == run_moving(3, shape, [])
    assert first[1] > 1


@pytest.mark.parametrize("seed", range(8))
def test_a_model_that_moves_is_right_through_all_faults(seed: int) -> None:
    run_moving(seed, moving_shape_of(seed), moving_faults_of(seed))


@pytest.mark.parametrize("shape", [SMALL, WORKERS, WORKERS._replace(asynchronous=True)], ids=["one", "rounds", "async"])
def test_without_a_rest_a_lost_step_is_found_out(shape: MovingShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation tells a right mechanism from a wrong one."""
    monkeypatch.setattr(Freeze, "check_step", lambda self, step: None)
    monkeypatch.setattr(Freeze, "check_contribution", lambda self, worker, number: None)
    monkeypatch.setattr(
        Passage, "_at_rest", lambda self, move: self._ledger.freeze.last_step if self._ledger.freeze else 0
    )
    numbers = Passage._numbers
    monkeypatch.setattr(
        Passage,
        "_numbers",
        lambda self: self._ledger.freeze.last_contributions if self._ledger.freeze else numbers(self),
    )
    with pytest.raises(Broken, match="told"):
        for seed in range(20):
            run_moving(seed, shape, [])


def test_without_a_record_on_the_disk_two_models_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The former shards are there again once their servers are restarted, and the new ones as well."""
    monkeypatch.setattr(MovedSessions, "_write", lambda self, disk, record: None)
    with pytest.raises(Broken):
        for seed in range(320, 420):
            run_moving(seed, moving_shape_of(seed), moving_faults_of(seed))
