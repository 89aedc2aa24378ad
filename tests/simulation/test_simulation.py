"""Histories of whole clusters on virtual time; `make simulate` has thousands of them."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import pytest

from stepwire_server.durability.epochs import Epochs
from stepwire_server.durability.writer import LogWriter
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.workers import Worker
from tests.simulation.disks import SimulatedDisk
from tests.simulation.faults import Fault, chosen, shrunk
from tests.simulation.history import Broken, Shape, faults_of, run, shape_of

ONE = Shape(shards=1, workers=1, steps=4, two_phase=False, large=False)
TWO = Shape(shards=1, workers=2, steps=3, two_phase=False, large=False)


def lost_load(seed: int) -> list[Fault]:
    """Return a partition that lets two workers come at once, and a loss of power at their first load."""
    return [Fault(0.017, "hold", 0, 1.4, 1), Fault(0.085, "power", 0, 3.0, 10 + seed % 10)]


def late_attach(seed: int) -> list[Fault]:
    """Return a server that stands still while workers attach, and whose connections break meanwhile."""
    return [Fault(0.03 + seed / 2000, "pause", 0, 0.4, 1), Fault(0.1 + seed / 1000, "cut", 0, 0.5, 1)]


@pytest.fixture(autouse=True)
def _without_log() -> Iterator[None]:
    """Tasks of killed processes end in errors, which their code logs."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_the_same_seed_is_the_same_history() -> None:
    shape = Shape(shards=2, workers=2, steps=3, two_phase=True, large=False)
    faults = [Fault(0.03, "kill", 1, 0.2, 5), Fault(0.05, "cut", 0, 0.1, 1), Fault(0.06, "replace", 0, 0.5, 1)]
    first, again = run(7, shape, faults), run(7, shape, faults)
    assert first == again
    assert run(8, shape, faults).trace != first.trace


@pytest.mark.parametrize("seed", range(4))
def test_a_model_of_shards_is_right_through_all_faults(seed: int) -> None:
    shape = Shape(shards=3, workers=1, steps=4, two_phase=seed % 2 == 0, large=False)
    run(seed, shape, chosen(random.Random(seed), 3, most=6, until=0.1))


def test_workers_whose_attaches_are_late_or_tell_of_others_loads_go_on() -> None:
    for seed in (33, 56):
        run(seed, TWO, lost_load(seed))
    for seed in (18, 29):
        run(seed, TWO, late_attach(seed))


def test_an_attach_that_does_not_wait_for_the_disk_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells of the load of another worker, which a loss of power takes away."""
    monkeypatch.setattr(Session, "settle", lambda self: None)
    with pytest.raises(Broken, match="STATE_LOST"):
        for seed in range(30, 60):
            run(seed, TWO, lost_load(seed))


def test_attempts_of_an_attach_without_a_number_in_common_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one stands in a paused server, comes behind the second one, and fences its own client."""
    acquire = Worker.acquire
    monkeypatch.setattr(Worker, "acquire", lambda self, stream=None, acquisition=0: acquire(self, stream))
    with pytest.raises(Broken, match="FENCED"):
        for seed in range(15, 35):
            run(seed, TWO, late_attach(seed))


def test_a_step_that_a_worker_repeats_counts_once() -> None:
    run(331, shape_of(331), faults_of(331))


def test_workers_whose_shard_was_lost_between_the_phases_go_on_when_it_is_back() -> None:
    """A worker that does not know the decision follows the one that the results of the other shards tell."""
    shape = Shape(shards=2, workers=2, steps=3, two_phase=True, large=False)
    for seed in range(3):
        run(seed, shape, [Fault(0.06 + seed * 0.005, "kill", 0, 5.5, 4)])


def test_without_a_fence_an_old_owner_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation tells a right mechanism from a wrong one."""
    monkeypatch.setattr(Epochs, "is_owner", lambda self, epoch: True)
    overtaken = [Fault(0.02, "overtake", 0, 0.0, 0), Fault(0.03, "stale", 0, 5.0, 0), Fault(0.03, "cut", 0, 0.0, 0)]
    with pytest.raises(Broken):
        for seed in range(10):
            run(seed, ONE, overtaken)


def test_without_a_wait_for_the_disk_a_lost_step_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few histories meet the moment between a reply and its sync."""
    monkeypatch.setattr(LogWriter, "wait", lambda self, number, timeout=None: None)
    with pytest.raises(Broken, match=r"told|no session|lost"):
        for seed in range(40):
            run(seed, ONE, [Fault(0.03 + seed / 8000, "power", 0, 0.05, 1)])


def test_a_disk_whose_syncs_do_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedDisk, "sync", lambda self, descriptor: None)
    with pytest.raises(Broken, match=r"told|no session|lost|damaged"):
        for seed in range(40):
            run(seed, ONE, [Fault(0.02 + seed / 1000, "power", 0, 0.05, 1)])


def test_faults_are_shrunk_to_those_that_matter() -> None:
    faults = chosen(random.Random(4), 4, most=8, until=1.0) + chosen(random.Random(5), 4, most=8, until=1.0)
    assert len(faults) > 4
    needed = {faults[1], faults[3]}
    assert set(shrunk(faults, lambda fewer: needed <= set(fewer))) == needed
