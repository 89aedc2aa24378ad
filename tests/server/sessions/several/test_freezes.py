"""A session of several workers that rests for a move: each worker has a last contribution, and rounds end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwire.errors import DataLossError, InvalidRequestError, Reason, StateChangedError, UnavailableError
from stepwire.optimizers.aggregation import Aggregation
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.freeze import Frozen, Rest
from tests.server.sessions.several.rig import Attached, Commit, Rig, Vector, config_of

SIZE = 3
SUMS = Aggregation(workers=2, reduction="sum")
ASYNC = Aggregation(workers=2, mode="async")


def filled(value: float) -> Vector:
    return np.full(SIZE, value, np.float32)


def contributed(rig: Rig, attached: Attached, number: int, value: float = 1.0, **fields: Any) -> Commit:
    return rig.commit(rig.staged(attached.holder, filled(value), number, **fields))


def result_of(commit: Commit) -> StepResult:
    assert isinstance(commit.outcome, StepResult)
    return commit.outcome


def frozen(rig: Rig, last: dict[int, int] | None = None, *, move_id: str = "one", seconds: float = 10.0) -> Frozen:
    found = rig.session.passage.freeze(move_id, 0, seconds, last)
    rig.settle()
    return found


def is_moving(commit: Commit) -> bool:
    return isinstance(commit.outcome, UnavailableError) and commit.outcome.reason == Reason.SESSION_MOVING


def test_an_open_round_ends_with_a_freeze_and_begins_anew_behind_it(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(SUMS, SIZE))
    first, second = rig.attach(0), rig.attach(1)
    waiting, ready = contributed(rig, first, 1, 1.0), rig.staged(second.holder, filled(2.0), 1)
    assert waiting.outcome is None
    assert frozen(rig) == (0, 0, 0, 1, {0: 0, 1: 0}, {0: 0, 1: 0}, frozenset())
    assert is_moving(waiting)
    assert is_moving(rig.commit(ready))
    with pytest.raises(UnavailableError, match="admitted none of worker 0 beyond 0"):
        rig.staged(first.holder, filled(1.0), 1)
    rig.session.passage.thaw("one")
    again = [contributed(rig, first, 1, 1.0), contributed(rig, second, 1, 2.0)]
    assert [result_of(each).step for each in again] == [1, 1]
    np.testing.assert_array_equal(rig.parameters, filled(-3.0))
    rig.close()


def test_a_round_that_another_shard_has_made_is_finished(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(SUMS, SIZE))
    first, second = rig.attach(0), rig.attach(1)
    waiting = contributed(rig, first, 1)
    assert frozen(rig, {0: 1, 1: 1}).last_contributions == {0: 1, 1: 1}
    assert waiting.outcome is None
    with pytest.raises(StateChangedError), rig.session.passage.exported("one"):
        pass
    done = contributed(rig, second, 1)
    assert (result_of(waiting).step, result_of(done).step) == (1, 1)
    assert frozen(rig) == (1, 1, 0, 1, {0: 1, 1: 1}, {0: 1, 1: 1}, frozenset())
    with rig.session.passage.exported("one") as captured:
        assert [(each.worker, each.contribution) for each in captured.members] == [(0, 1), (1, 1)]
    assert result_of(contributed(rig, second, 1)).replayed is True
    with pytest.raises(UnavailableError):
        rig.staged(first.holder, filled(1.0), 2)
    rig.close()


def test_a_round_of_which_a_part_is_beyond_the_rest_ends_too(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(SUMS, SIZE))
    first, second = rig.attach(0), rig.attach(1)
    waiting = contributed(rig, first, 1)
    frozen(rig, {1: 1})
    assert is_moving(waiting)
    rig.leave(second)
    rig.close()


def test_asynchronous_workers_rest_each_at_a_number_of_its_own(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(ASYNC, SIZE))
    first, second = rig.attach(0), rig.attach(1)
    contributed(rig, first, 1)
    ready = rig.staged(second.holder, filled(1.0), 1)
    assert frozen(rig, {0: 2}).last_contributions == {0: 2, 1: 0}
    assert is_moving(rig.commit(ready))
    contributed(rig, first, 2)
    assert frozen(rig).contributions == {0: 2, 1: 0}
    with pytest.raises(UnavailableError, match="worker 0 beyond 2"):
        rig.staged(first.holder, filled(1.0), 3)
    with rig.session.passage.exported("one") as captured:
        assert captured.numbers.step == 2
    rig.close()


def test_a_worker_that_is_ahead_waits_for_nobody_in_a_session_that_moves(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(Aggregation(workers=2, mode="async", max_clock_lead=0), SIZE))
    first, second = rig.attach(0), rig.attach(1)
    contributed(rig, first, 1)
    waiting = contributed(rig, first, 2)
    assert waiting.outcome is None
    frozen(rig)
    assert is_moving(waiting)
    rig.leave(second)
    rig.close()


@pytest.mark.parametrize("together", [SUMS, ASYNC], ids=["rounds", "async"])
def test_nobody_joins_a_session_that_moves_but_those_who_are_named(engine: CpuEngine, together: Aggregation) -> None:
    rig = Rig(engine, config_of(together, SIZE))
    first = rig.attach(0)
    assert frozen(rig).contributions == {0: 0}
    for worker in (1, None):
        with pytest.raises(UnavailableError, match="worker 1: .* joined by no other worker"):
            rig.attach(worker)
    rig.leave(first)
    first = rig.attach(0, first.holder.token)
    assert frozen(rig, {1: 0}).last_contributions == {0: 0, 1: 0}
    with pytest.raises(StateChangedError), rig.session.passage.exported("one"):
        pass
    second = rig.attach(1)
    with rig.session.passage.exported("one") as captured:
        assert len(captured.members) == 2
    rig.leave(first)
    rig.leave(second)
    rig.close()


def test_a_session_leaves_at_the_contributions_that_were_exported_alone(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(ASYNC, SIZE))
    first = rig.attach(0)
    contributed(rig, first, 1)
    frozen(rig)
    for numbers in ({}, {0: 0}, {0: 1, 1: 0}):
        with pytest.raises(StateChangedError), rig.session.passage.leaving("one", Rest("one", 1, 0, 1, numbers)):
            pass
    with rig.session.passage.leaving("one", Rest("one", 1, 0, 1, {0: 1})) as holds:
        assert [(worker, hold.acquired) for worker, hold in holds.items()] == [(0, first.holder.acquired)]
    assert rig.session.ledger.closed
    assert rig.budget.reserved_bytes == 0


def test_a_freeze_that_is_over_holds_nobody_back(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(ASYNC, SIZE))
    first = rig.attach(0)
    frozen(rig, seconds=5.0)
    rig.pass_time(5.0)
    assert result_of(contributed(rig, first, 1)).step == 1
    rig.attach(1)
    rig.close()


def test_numbers_of_no_worker_are_refused(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(SUMS, SIZE))
    rig.attach(0)
    with pytest.raises(InvalidRequestError, match="last_contributions: the session has no worker 2"):
        frozen(rig, {2: 1})
    assert rig.session.ledger.freeze is None
    rig.close()


def test_a_session_whose_record_is_being_kept_neither_parks_nor_takes_a_stream(engine: CpuEngine) -> None:
    """The disk may have the record, with the holds of that moment; nothing here may go on behind it."""
    rig = Rig(engine, config_of(ASYNC, SIZE))
    first = rig.attach(0)
    contributed(rig, first, 1)
    rig.leave(first)
    frozen(rig)
    rest, moment = Rest("one", 1, 0, 1, {0: 1}), (1, 0, 1 << 60)
    with pytest.raises(DataLossError), rig.session.passage.leaving("one", rest):
        raise DataLossError("the disk failed")
    rig.pass_time(1e9)
    assert not rig.session.passage.retire(*moment)
    with pytest.raises(UnavailableError, match="joined by no stream") as refused:
        rig.attach(0, first.holder.token)
    assert refused.value.reason == Reason.SESSION_MOVING
    with pytest.raises(InterruptedError), rig.session.passage.leaving("one", rest):
        raise InterruptedError
    assert not rig.session.passage.retire(*moment), "a failure of another kind changes nothing"
    with rig.session.passage.leaving("one", rest) as holds:
        assert [(worker, hold.generation) for worker, hold in holds.items()] == [(0, first.holder.generation)]
    assert rig.session.ledger.closed


def test_a_session_whose_record_was_not_kept_goes_on_when_its_freeze_is_over(engine: CpuEngine) -> None:
    rig = Rig(engine, config_of(ASYNC, SIZE))
    first = rig.attach(0)
    frozen(rig, seconds=5.0)
    with pytest.raises(InterruptedError), rig.session.passage.leaving("one", Rest("one", 0, 0, 1, {0: 0})):
        raise InterruptedError
    rig.pass_time(5.0)
    assert result_of(contributed(rig, first, 1)).step == 1
    rig.close()
