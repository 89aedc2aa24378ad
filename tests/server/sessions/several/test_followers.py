"""A session of several workers behind a move: those that were present there are awaited, until they have followed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from stepwire.errors import FencedError, InvalidRequestError, ResourceExhaustedError
from stepwire.optimizers.aggregation import Aggregation
from stepwire.v1 import move_pb2
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.records.step_result import StepResult
from stepwire_server.rpc.state_numbers import decode_numbers, encode_numbers
from tests.server.sessions.several.rig import Attached, Commit, Rig, config_of

SIZE = 3
SOME = Aggregation(workers=3, required_workers=2, reduction="sum", least_grace=40.0, most_grace=40.0)
AHEAD = Aggregation(workers=3, mode="async", max_clock_lead=1)


def contributed(rig: Rig, attached: Attached, number: int) -> Commit:
    return rig.commit(rig.staged(attached.holder, np.ones(SIZE, np.float32), number))


def workers_of(commit: Commit) -> list[int]:
    assert isinstance(commit.outcome, StepResult) and commit.outcome.round is not None
    return [each.worker for each in commit.outcome.round.contributors]


class Former(Rig):
    """A session in which each worker has contributed once, and some are present still."""

    def __init__(self, engine: CpuEngine, together: Aggregation, present: int) -> None:
        super().__init__(engine, config_of(together, SIZE))
        attached = [self.attach(index) for index in range(together.workers)]
        for each in attached:
            contributed(self, each, 1)
        for each in attached[present:]:
            self.leave(each)
        self._present = attached[:present]


def exported(rig: Rig) -> move_pb2.StateNumbers:
    rig.session.passage.freeze("one", 0, 1e6)
    rig.settle()
    with rig.session.passage.exported("one") as captured:
        return encode_numbers(captured)


def moved(engine: CpuEngine, former: Rig) -> tuple[Rig, list[int]]:
    """Move a session, and return the new one with the proofs of its workers' first holds."""
    numbers = exported(former)
    rig = Rig(engine, former.session.config)
    holder = rig.attach(0)
    with rig.session.passage.importing(holder.holder.token) as imported, former.session.passage.exported("one") as own:
        for slot, start, values in own.blocks:
            imported.add(slot, start, values)
        rig.leave(holder)
        rig.session.passage.complete(imported, decode_numbers(numbers, rig.session.config))
    members = rig.session.ledger.members
    return rig, [members.tokens.token(index, 1) for index in range(members.most)]


def test_a_round_of_some_workers_awaits_those_that_follow(engine: CpuEngine) -> None:
    rig, tokens = moved(engine, Former(engine, SOME, 3))
    first, second = rig.attach(0, tokens[0]), rig.attach(1, tokens[1])
    waiting = [contributed(rig, first, 2), contributed(rig, second, 2)]
    assert [each.outcome for each in waiting] == [None, None]
    third = rig.attach(2, tokens[2])
    assert workers_of(contributed(rig, third, 2)) == [0, 1, 2]
    assert [workers_of(each) for each in waiting] == [[0, 1, 2]] * 2
    rig.leave(third)
    waiting = [contributed(rig, first, 3), contributed(rig, second, 3)]
    assert [workers_of(each) for each in waiting] == [[0, 1]] * 2, "one that left has come before"
    rig.close()


def test_one_that_does_not_follow_costs_its_time_alone(engine: CpuEngine) -> None:
    rig, tokens = moved(engine, Former(engine, SOME, 3))
    first, second = rig.attach(0, tokens[0]), rig.attach(1, tokens[1])
    waiting = [contributed(rig, first, 2), contributed(rig, second, 2)]
    rig.pass_time(29.0)
    assert [each.outcome for each in waiting] == [None, None]
    rig.pass_time(2.0)
    assert [workers_of(each) for each in waiting] == [[0, 1]] * 2
    rig.close()


def test_one_that_a_round_has_not_waited_for_is_awaited_no_more(engine: CpuEngine) -> None:
    patient = Aggregation(workers=3, required_workers=2, reduction="sum", least_grace=5.0, most_grace=5.0)
    rig, tokens = moved(engine, Former(engine, patient, 3))
    first, second = rig.attach(0, tokens[0]), rig.attach(1, tokens[1])
    waiting = [contributed(rig, first, 2), contributed(rig, second, 2)]
    rig.pass_time(5.0)
    assert [workers_of(each) for each in waiting] == [[0, 1]] * 2
    waiting = [contributed(rig, first, 3), contributed(rig, second, 3)]
    assert [workers_of(each) for each in waiting] == [[0, 1]] * 2
    rig.close()


def test_one_that_had_left_before_is_awaited_by_nobody(engine: CpuEngine) -> None:
    rig, tokens = moved(engine, Former(engine, SOME, 2))
    waiting = [contributed(rig, rig.attach(index, tokens[index]), 2) for index in (0, 1)]
    assert [workers_of(each) for each in waiting] == [[0, 1]] * 2
    rig.close()


def test_the_time_to_follow_begins_as_the_first_one_comes(engine: CpuEngine) -> None:
    """The new state may be on its way to a disk, or to a store, for longer than that."""
    rig, tokens = moved(engine, Former(engine, SOME, 3))
    rig.pass_time(1000.0)
    with pytest.raises(ResourceExhaustedError):
        rig.attach(None)
    first, second = rig.attach(0, tokens[0]), rig.attach(1, tokens[1])
    waiting = [contributed(rig, first, 2), contributed(rig, second, 2)]
    assert [each.outcome for each in waiting] == [None, None]
    assert workers_of(contributed(rig, rig.attach(2, tokens[2]), 2)) == [0, 1, 2]
    rig.close()


def test_a_round_waits_no_longer_than_one_is_awaited(engine: CpuEngine) -> None:
    rig, tokens = moved(engine, Former(engine, SOME, 3))
    rig.attach(0, tokens[0])
    members = rig.session.ledger.members
    assert members.next_absence(rig.now) == rig.now + 30.0
    rig.pass_time(31.0)
    assert members.next_absence(rig.now) == math.inf
    rig.close()


def test_one_that_is_refused_takes_no_followers_place(engine: CpuEngine) -> None:
    """A client that was fenced before the move follows it as well."""
    rig, tokens = moved(engine, Former(engine, SOME, 3))
    with pytest.raises(FencedError):
        rig.attach(2, tokens[2] ^ 1)
    with pytest.raises(ResourceExhaustedError):
        rig.attach(None)
    first, second = rig.attach(0, tokens[0]), rig.attach(1, tokens[1])
    waiting = [contributed(rig, first, 2), contributed(rig, second, 2)]
    assert [each.outcome for each in waiting] == [None, None]
    assert workers_of(contributed(rig, rig.attach(2, tokens[2]), 2)) == [0, 1, 2]
    rig.close()


def test_a_newcomer_takes_no_worker_that_follows(engine: CpuEngine) -> None:
    rig, tokens = moved(engine, Former(engine, SOME, 2))
    newcomer = rig.attach(None)
    assert newcomer.holder.worker == 2
    with pytest.raises(ResourceExhaustedError, match="all 3 workers"):
        rig.attach(None)
    follower = rig.attach(1, tokens[1])
    rig.pass_time(31.0)
    assert rig.attach(None).holder.worker == 0
    assert follower.holder is rig.session.ledger.members[1].worker.holder
    rig.close()


def test_a_bounded_lead_goes_on(engine: CpuEngine) -> None:
    former = Rig(engine, config_of(AHEAD, SIZE))
    first, second = former.attach(0), former.attach(1)
    assert contributed(former, first, 1).outcome is not None
    rig, tokens = moved(engine, former)
    former.leave(second)
    ahead = rig.attach(0, tokens[0])
    assert isinstance(contributed(rig, ahead, 2).outcome, StepResult), "it was one ahead"
    waiting = contributed(rig, ahead, 3)
    assert waiting.outcome is None
    assert workers_of(contributed(rig, rig.attach(1, tokens[1]), 1)) == [1]
    assert workers_of(waiting) == [0]
    rig.close()


def test_the_clocks_of_all_come_along(engine: CpuEngine) -> None:
    """A worker that was ahead and absent gets no further lead by the move."""
    former = Rig(engine, config_of(AHEAD, SIZE))
    first, second = former.attach(0), former.attach(1)
    assert contributed(former, first, 1).outcome is not None
    former.leave(first)
    rig, tokens = moved(engine, former)
    former.leave(second)
    assert rig.session.ledger.members.clocks() == {0: 1, 1: 0}
    ahead = rig.attach(0, tokens[0])
    assert contributed(rig, ahead, 2).outcome is not None
    assert contributed(rig, ahead, 3).outcome is None
    rig.leave(ahead)
    rig.close()


def test_a_lead_over_one_that_does_not_follow_ends_with_its_time(engine: CpuEngine) -> None:
    rig, tokens = moved(engine, Former(engine, AHEAD, 2))
    ahead = rig.attach(0, tokens[0])
    for number in (2, 3):
        assert contributed(rig, ahead, number).outcome is not None
    waiting = contributed(rig, ahead, 4)
    assert waiting.outcome is None
    rig.pass_time(31.0)
    assert workers_of(waiting) == [0]
    rig.close()


def test_one_that_has_not_followed_a_move_by_the_next_is_awaited_again(engine: CpuEngine) -> None:
    rig, tokens = moved(engine, Former(engine, AHEAD, 2))
    again, _ = moved(engine, rig)
    follows = [(each.worker, each.present, each.clock) for each in exported(again).workers]
    assert follows == [(0, True, 1), (1, True, 1), (2, False, 1)]


@pytest.mark.parametrize(("field", "value"), [("clock", 2**53), ("contribution", 2**60)])
def test_numbers_that_are_none_are_refused(engine: CpuEngine, field: str, value: int) -> None:
    rig = Former(engine, SOME, 3)
    numbers: Any = exported(rig)
    setattr(numbers.workers[1], field, value)
    with pytest.raises(InvalidRequestError, match=rf"numbers.workers\[1\].{field}: {value} is not below"):
        decode_numbers(numbers, rig.session.config)
    rig.close()
