"""The numbers of a session, and the admission of the next."""

from __future__ import annotations

import msgspec
import pytest

from stepwire import errors
from stepwire.errors import Reason
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.durability.manifest import MemberFacts
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult, StepTimes
from stepwire_server.sessions.ledger import Ledger, session_not_found
from stepwire_server.sessions.members import Members
from stepwire_server.sessions.workers import Holder

ID = "0123456789abcdef0123456789abcdef"


def result(step: int) -> StepResult:
    return StepResult(step, 3, False, 0.0, 0, (), StepTimes(0.0, 0.0, 0.0))


def step(number: int, epoch: int = 0, load: int | None = None) -> StepRequest:
    return StepRequest(number, epoch, FLOAT32, FLOAT32, True, 1 << 20, (), load=load)


def load(number: int, step: int | None = None, slots: tuple[str, ...] = ("param",), epoch: int = 0) -> LoadRequest:
    return LoadRequest(number, slots, epoch=epoch, step=step)


def holder(ledger: Ledger) -> Holder:
    return ledger.worker.holder


def ledger_at(step: int, loads: int = 0) -> Ledger:
    """Make a ledger in epoch 3 whose worker is held."""
    ledger = Ledger(ID, epoch=3, ready=True)
    ledger.worker.acquire()
    ledger.applied_load = loads
    if step:
        ledger.commit_step(result(step))
    return ledger


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("applied", [0, 1, 7, 2**53])
def test_the_next_step_is_admitted_and_the_last_is_a_replay(applied: int, epoch: int) -> None:
    ledger = ledger_at(applied)
    assert ledger.admit_step(step(applied + 1, epoch), holder(ledger)) is True
    if applied:
        assert ledger.admit_step(step(applied, epoch), holder(ledger)) is False


@pytest.mark.parametrize(
    ("applied", "actual", "reason"),
    [
        (0, 0, Reason.STEP_SUPERSEDED),
        (0, 2, Reason.STEP_MISMATCH),
        (7, 6, Reason.STEP_SUPERSEDED),
        (7, 0, Reason.STEP_SUPERSEDED),
        (7, 9, Reason.STEP_MISMATCH),
        (7, 2**64 - 1, Reason.STEP_MISMATCH),
    ],
)
def test_every_other_step_is_refused_with_the_number_that_would_be_right(
    applied: int, actual: int, reason: Reason
) -> None:
    with pytest.raises(errors.StepMismatchError, match=f"step {actual} .* the next step is {applied + 1}") as refused:
        (ledger := ledger_at(applied)).admit_step(step(actual), holder(ledger))
    assert refused.value.reason is reason
    assert refused.value.metadata == {"expected_step": str(applied + 1), "actual_step": str(actual)}


@pytest.mark.parametrize("applied", [0, 4])
def test_loads_are_numbered_alike(applied: int) -> None:
    ledger = ledger_at(2, applied)
    assert ledger.admit_load(load(applied + 1), holder(ledger)) is True
    if applied:
        assert ledger.admit_load(load(applied), holder(ledger)) is False
    for other in (applied + 2, applied - 1 if applied else 0):
        with pytest.raises(errors.StepMismatchError) as refused:
            ledger.admit_load(load(other), holder(ledger))
        assert refused.value.metadata == {"expected_load": str(applied + 1), "actual_load": str(other)}


def test_the_last_load_of_a_worker_stays_a_replay_behind_those_of_others() -> None:
    ledger = Ledger(ID, epoch=3, ready=True, workers=3)
    holders = [ledger.members[index].worker.acquire() for index in range(3)]
    for number, index in ((1, 0), (2, 1), (3, 1)):
        assert ledger.admit_load(load(number), holders[index]) is True
        ledger.commit_load(load(number), holders[index])
    assert [ledger.members.loader(number) for number in (1, 2, 3)] == [0, None, 1]
    assert ledger.admit_load(load(1), holders[0]) is False
    assert ledger.admit_load(load(3), holders[2]) is False
    for number, index, own in ((2, 1, "3"), (2, 0, "1"), (1, 2, "0")):
        with pytest.raises(errors.StepMismatchError, match=r"the next load is 4") as refused:
            ledger.admit_load(load(number), holders[index])
        assert refused.value.metadata == {"expected_load": "4", "actual_load": str(number), "worker_load": own}


def test_a_checkpoint_tells_of_the_loads_of_workers() -> None:
    members, other = Members(3), Members(3)
    for index, answered, loaded in ((0, 2, 4), (1, 4, 0), (2, 0, 3)):
        member = members[index]
        member.worker.acquire()
        member.loaded = loaded
        if answered:
            member.answered(7, answered, result(9))
    facts = msgspec.json.decode(msgspec.json.encode(members.facts(4)), type=tuple[MemberFacts, ...])
    assert [(each.load, each.loaded) for each in facts] == [(2, 4), (None, 0), (None, 3)]
    other.restore(facts, 4, epoch=5)
    assert [(each.number, each.load, each.loaded) for each in other] == [(7, 2, 4), (7, 4, 0), (0, 0, 3)]
    assert other.begin_anew(4) == {0, 2}
    other.even_out({0: 9, 1: 9}, 4)
    assert [(each.number, each.result is None) for each in other] == [(9, True), (7, False), (0, True)]
    again = Members(3)
    again.restore(other.facts(4), 4, epoch=6)
    assert [(each.number, each.load, each.result is None) for each in again] == [
        (9, 2, True),
        (7, 4, False),
        (0, 0, True),
    ]


@pytest.mark.parametrize("moved", [5, 6, 2**40])
def test_a_load_may_move_the_step_forward(moved: int) -> None:
    ledger = ledger_at(5)
    assert ledger.admit_load(load(1, moved), holder(ledger))
    ledger.commit_load(load(1, moved, ("exp_avg",)), holder(ledger))
    assert (ledger.applied_load, ledger.applied_step) == (1, moved)
    assert ledger.admit_step(step(moved + 1, 0), holder(ledger)) is True


def test_a_load_may_not_move_the_step_back() -> None:
    with pytest.raises(errors.StepMismatchError, match=r"open\.step is 4 and the session is at step 5") as refused:
        (ledger := ledger_at(5)).admit_load(load(1, 4), holder(ledger))
    assert refused.value.reason is Reason.STEP_SUPERSEDED


def test_a_step_that_a_load_has_set_cannot_be_replayed() -> None:
    """No result of it is known here: another session applied it."""
    ledger = ledger_at(5)
    ledger.commit_load(load(1, 9), holder(ledger))
    with pytest.raises(errors.StepMismatchError):
        ledger.admit_step(step(9, 0), holder(ledger))


def test_a_load_that_leaves_the_step_leaves_its_result() -> None:
    ledger = ledger_at(5)
    for number, moved in ((1, None), (2, 5)):
        ledger.commit_load(load(number, moved), holder(ledger))
        assert ledger.admit_step(step(5, 0), holder(ledger)) is False


def test_only_a_load_of_parameters_makes_a_session_ready() -> None:
    ledger = Ledger(ID, epoch=1, ready=False)
    ledger.worker.acquire()
    ledger.commit_load(load(1, slots=("exp_avg",)), holder(ledger))
    with pytest.raises(errors.SessionNotReadyError, match=ID):
        ledger.admit_step(step(1, 0), holder(ledger))
    ledger.commit_load(load(2), holder(ledger))
    assert ledger.admit_step(step(1, 0), holder(ledger)) is True
    ledger.commit_load(load(3, slots=("exp_avg",)), holder(ledger))
    assert ledger.ready


def test_only_the_holder_steps_and_loads() -> None:
    ledger = ledger_at(0)
    former = holder(ledger)
    ledger.worker.acquire()
    with pytest.raises(errors.FencedError):
        ledger.admit_step(step(1), former)
    with pytest.raises(errors.FencedError):
        ledger.admit_load(load(1), former)


@pytest.mark.parametrize("known", [0, 2])
def test_a_step_for_the_state_of_another_load_is_refused(known: int) -> None:
    ledger = ledger_at(4, loads=1)
    assert ledger.admit_step(step(5, load=1), holder(ledger)) is True
    for number in (4, 5):
        with pytest.raises(
            errors.StateChangedError, match=f"load {known}, and the session's last load is 1"
        ) as refused:
            ledger.admit_step(step(number, load=known), holder(ledger))
        assert refused.value.metadata == {"load": str(known), "applied_load": "1"}


def test_a_client_that_knows_more_durable_steps_than_the_server_is_refused() -> None:
    ledger = ledger_at(9)
    ledger.durable_step = 7
    ledger.check_durable(7)
    with pytest.raises(errors.DataLossError, match="durable up to step 7 here, and the client knows step 8") as refused:
        ledger.check_durable(8)
    assert refused.value.reason is Reason.DURABLE_STEP_LOST
    assert refused.value.metadata == {"durable_step": "7", "known_durable_step": "8"}


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_another_epoch_is_stale(epoch: int) -> None:
    with pytest.raises(errors.FencedError, match=f"in epoch 3, the request is of epoch {epoch}") as refused:
        (ledger := ledger_at(0)).admit_step(step(1, epoch), holder(ledger))
    assert refused.value.reason is Reason.STALE_EPOCH
    assert refused.value.metadata == {"epoch": "3", "actual_epoch": str(epoch)}
    with pytest.raises(errors.FencedError, match=f"the request is of epoch {epoch}"):
        ledger.admit_load(load(1, epoch=epoch), holder(ledger))


def test_damage_is_for_ever() -> None:
    ledger = ledger_at(2)
    with pytest.raises(RuntimeError, match="half-way"), ledger.changing("step", 3):
        raise RuntimeError("half-way")
    for call in (
        lambda: ledger.admit_step(step(3, 0), holder(ledger)),
        lambda: ledger.admit_step(step(2, 0), holder(ledger)),
        lambda: ledger.admit_load(load(1), holder(ledger)),
        ledger.check_usable,
    ):
        with pytest.raises(errors.DataLossError, match="damaged when step 3 failed half-way") as refused:
            call()
        assert refused.value.reason is Reason.SESSION_DAMAGED
    ledger.check_open()


def test_a_closed_session_is_not_found() -> None:
    ledger = ledger_at(2)
    ledger.closed = True
    for call in (
        lambda: ledger.admit_step(step(3, 0), holder(ledger)),
        lambda: ledger.admit_load(load(1), holder(ledger)),
        ledger.check_open,
    ):
        with pytest.raises(errors.SessionNotFoundError) as refused:
            call()
        assert refused.value.metadata == {"session_id": ID}


def test_an_id_is_shown_escaped_and_cut() -> None:
    error = session_not_found("a\n" * 100)
    assert repr(("a\n" * 100)[:64]) in str(error)
    assert "\n" not in str(error)
    assert len(error.metadata["session_id"]) == 64
