"""The duties of workers of one session: nobody waits for those who came late, or who hold what others need."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from stepwire.errors import InvalidRequestError, NotEnoughWorkersError, StateChangedError, UnavailableError
from stepwire.layout import TensorSpec
from stepwire.optimizers import SGD
from stepwire.optimizers.aggregation import Aggregation
from stepwire.optimizers.gradient_treatment import GradientTreatment
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.records.step_request import Decision
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.contributions import Contributions
from tests.server.configs import make_config
from tests.server.session_driver import RecordingWriter
from tests.server.sessions.several.rig import PATIENCE_SECONDS, Attached, Commit, Rig, Vector, config_of

SIZE = 3


def filled(value: float) -> Vector:
    return np.full(SIZE, value, np.float32)


def contributed(rig: Rig, attached: Attached, number: int, value: float = 1.0, **fields: Any) -> Commit:
    return rig.commit(rig.staged(attached.holder, filled(value), number, **fields))


def part_of(commit: Commit) -> Any:
    return commit.outcome.round  # type: ignore[union-attr]


def contributions_of(rig: Rig) -> Contributions:
    assert rig.session.contributions is not None
    return rig.session.contributions


def test_a_session_is_in_use_while_any_worker_is_attached(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(Aggregation(workers=2), SIZE))
    attached = rig.attach(1)
    assert not rig.session.passage.retire(0, 0, 0)
    rig.leave(attached)
    assert rig.session.passage.retire(0, 0, 0)


def test_nobody_waits_until_a_worker_that_joins_has_caught_up(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(Aggregation(workers=2, mode="async", max_clock_lead=1), SIZE))
    first = rig.attach(0)
    for number in range(1, 10):
        assert contributed(rig, first, number).outcome is not None
    second = rig.attach(1)
    assert contributed(rig, first, 10).outcome is not None
    assert contributed(rig, first, 11).outcome is not None
    waiting = contributed(rig, first, 12)
    assert waiting.outcome is None
    assert part_of(contributed(rig, second, 1)).contribution == 1
    assert part_of(waiting).contribution == 12
    ahead = contributed(rig, first, 13)
    assert ahead.outcome is None
    rig.leave(second)
    assert part_of(ahead).contribution == 13
    rig.close()


def test_a_worker_that_is_held_back_for_too_long_is_told_and_steps_again(engine: CpuEngine) -> None:
    together = Aggregation(workers=2, mode="async", max_clock_lead=0, round_timeout=5.0)
    rig = Rig(engine, config_of(together, SIZE))
    first, second = rig.attach(0), rig.attach(1)
    contributed(rig, first, 1)
    waiting = contributed(rig, first, 2)
    rig.pass_time(4.9)
    assert waiting.outcome is None
    rig.pass_time(0.2)
    assert isinstance(waiting.outcome, NotEnoughWorkersError)
    assert waiting.outcome.metadata["missing_workers"] == "1"
    contributed(rig, second, 1)
    assert part_of(contributed(rig, first, 2)).contribution == 2
    np.testing.assert_array_equal(rig.parameters, filled(-3.0))
    rig.close()


def vacant(contributions: Contributions) -> bool:
    """Tell whether another upload may begin."""
    entered = threading.Thread(
        target=lambda: contributions.upload(ClientStream(lambda: None, 0.0)).release(), daemon=True
    )
    entered.start()
    entered.join(PATIENCE_SECONDS)
    return not entered.is_alive()


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_worker_that_waits_keeps_no_place_among_the_uploads(engine: CpuEngine, mode: Any) -> None:
    lead = 0 if mode == "async" else None
    rig = Rig(engine, config_of(Aggregation(workers=2, mode=mode, uploads_at_once=1, max_clock_lead=lead), SIZE))
    contributions = contributions_of(rig)
    first, second = rig.attach(0), rig.attach(1)
    contributed(rig, first, 1)
    if mode == "sync":  # it is in the round already, and is asked for again
        first = rig.attach(0, first.holder.token)
    number = 2 if mode == "async" else 1
    slot = contributions.upload(ClientStream(lambda: None, 0.0))
    step = rig.session.begin(rig.request(number), first.holder, 0.0, slot)
    step.add(0, SIZE, filled(1.0).view(np.uint8))
    assert rig.commit(step).outcome is None
    assert vacant(contributions)
    rig.leave(second)
    rig.close()


def test_another_client_of_a_worker_is_told_that_its_own_gradient_is_not_in_the_round(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(Aggregation(workers=2), SIZE))
    former, other = rig.attach(0), rig.attach(1)
    fenced = contributed(rig, former, 1, 10.0)
    present = rig.attach(0)
    assert fenced.outcome is not None
    waiting = contributed(rig, present, 1, 20.0)
    assert not part_of(contributed(rig, other, 1, 30.0)).dropped
    assert (part_of(waiting).dropped, part_of(waiting).contribution) == (True, 1)
    assert [each.worker for each in part_of(waiting).contributors] == [0, 1]
    np.testing.assert_array_equal(rig.parameters, filled(-20.0))
    rig.close()


def test_a_contribution_that_is_asked_for_again_stays_as_it_was(engine: CpuEngine) -> None:
    layout = (TensorSpec("a", (2,)), TensorSpec("b", (1,)))
    treatment = GradientTreatment(missing_gradient="keep")
    together = Aggregation(workers=2)
    rig = Rig(engine, make_config(*layout, optimizer=SGD(lr=1.0), treatment=treatment, aggregation=together))
    first, second = rig.attach(0), rig.attach(1)
    size = rig.session.config.layout.size
    given = np.full(size, 4.0, np.float32)
    rig.commit(rig.staged(first.holder, given, 1))
    first = rig.attach(0, first.holder.token)
    again = rig.commit(rig.staged(first.holder, None, 1, missing=frozenset({1})))
    rig.commit(rig.staged(second.holder, given, 1, missing=frozenset({1})))
    assert part_of(again).contribution == 1
    elements = [tensor.offset for tensor in rig.session.config.layout.tensors]
    np.testing.assert_array_equal(rig.parameters[elements], [-4.0, -2.0])
    rig.close()


def test_a_decision_about_a_round_that_a_load_has_ended_brings_no_gradient_into_the_next(engine: CpuEngine) -> None:
    treatment = GradientTreatment(clip_grad_norm=1.0, two_phase=True)
    rig = Rig(engine, config_of(Aggregation(workers=1), SIZE, treatment=treatment))
    attached = rig.attach(0)
    with rig.staged(attached.holder, filled(1.0), 1) as step:
        assert rig.session.check(step) is not None
        rig.load(attached.holder, filled(5.0))
        step.decision = Decision()
        with pytest.raises(StateChangedError, match="send it again"):
            rig.session.commit(step, RecordingWriter(SIZE, np.dtype(np.float32)))
    assert rig.session.ledger.applied_step == 0
    rig.close()


def test_nobody_waits_for_a_client_that_has_left_and_its_contribution_counts(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(Aggregation(workers=2, round_timeout=1e6), SIZE))
    first, second = rig.attach(0), rig.attach(1)
    waiting = contributed(rig, first, 1, 2.0)
    rig.session.let_go()
    rig.settle()
    assert waiting.outcome is None
    first.stream.left()
    rig.session.let_go()
    rig.settle()
    assert isinstance(waiting.outcome, UnavailableError)
    rig.leave(first)
    assert [each.worker for each in part_of(contributed(rig, second, 1, 4.0)).contributors] == [0, 1]
    np.testing.assert_array_equal(rig.parameters, filled(-3.0))
    rig.close()


def test_a_token_is_one_workers(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(Aggregation(workers=3), SIZE))
    attached = rig.attach(None)
    with pytest.raises(InvalidRequestError, match="attach_token"):
        rig.attach(None, attached.holder.token)
    rig.close()
