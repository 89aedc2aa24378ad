"""Histories of a primary and its standbys on virtual time."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from stepwire_server.replication.claims import Claim, Claims
from stepwire_server.replication.replica import Replica
from tests.simulation.history import Broken
from tests.simulation.pair_history import PairFault, PairShape, pair_faults_of, pair_shape_of, run_pair

SMALL = PairShape(steps=4, large=False, alone=False)


@pytest.fixture(autouse=True)
def _without_log() -> Iterator[None]:
    """Tasks of killed processes end in errors, which their code logs."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_the_same_seed_is_the_same_history_of_a_pair() -> None:
    faults = [PairFault(0.4, "promote", 0.2), PairFault(0.5, "cut", 0.0)]
    first = run_pair(3, SMALL, faults)
    assert first == run_pair(3, SMALL, faults)
    assert first[1] == 1


def test_a_killed_primary_comes_back_behind_the_standby_that_promoted_itself() -> None:
    vacant = PairShape(steps=8, large=False, alone=False, vacant=True)
    faults = [PairFault(0.5, "kill", 0.0), PairFault(4.0, "kill", 0.0)]
    assert run_pair(5, vacant, faults)[1] == 2


@pytest.mark.parametrize("seed", range(8))
def test_a_pair_is_right_through_all_faults(seed: int) -> None:
    run_pair(seed, pair_shape_of(seed), pair_faults_of(seed))


def test_without_a_wait_for_the_standby_a_lost_step_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation tells a right mechanism from a wrong one."""
    monkeypatch.setattr(Replica, "wait", lambda self, number: None)
    longer = PairShape(steps=8, large=False, alone=False)
    with pytest.raises(Broken, match="told"):
        for seed in range(1, 20):
            run_pair(seed, longer, [PairFault(0.5, "apart", 12.0), PairFault(4.0, "kill", 0.0)])


def test_without_claims_two_servers_that_speak_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A primary that goes on alone, and its standby that is promoted: without the claim both would go on."""
    alone = PairShape(steps=8, large=False, alone=True)
    make = Claims.make

    def grabbed(claims: Claims, claim: Claim) -> bool:
        while not make(claims, claim):
            claim = claim._replace(epoch=claims.newest().epoch + 1)
        return True

    monkeypatch.setattr(Claims, "make", grabbed)
    with pytest.raises(Broken):
        for seed in range(5, 20):
            run_pair(seed, alone, [PairFault(0.5, "crossed", 12.0)])
