"""What is committed, and who may commit what next."""

from __future__ import annotations

import pytest

from stepwire import errors
from stepwire.errors import Reason
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.ledger import Ledger, session_not_found

ID = "0123456789abcdef0123456789abcdef"


def record(step: int) -> StepResult:
    return StepResult(step, 3, False, 0.0, 0, (), 0.0, 0.0, 0.0)


def ledger_at(step: int, load: int = 0) -> Ledger:
    """Make a ledger in epoch 3 whose holder has token 1."""
    ledger = Ledger(ID, epoch=3, ready=True)
    ledger.worker.take()
    ledger.applied_load = load
    if step:
        ledger.commit_step(record(step))
    return ledger


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize("applied", [0, 1, 7, 2**53])
def test_the_next_step_is_admitted_and_the_last_is_a_replay(applied: int, epoch: int) -> None:
    ledger = ledger_at(applied)
    assert ledger.admit_step(applied + 1, epoch, 1) is True
    if applied:
        assert ledger.admit_step(applied, epoch, 1) is False


@pytest.mark.parametrize(
    ("applied", "step", "reason"),
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
    applied: int, step: int, reason: Reason
) -> None:
    with pytest.raises(errors.StepMismatchError, match=f"step {step} .* the next step is {applied + 1}") as refused:
        ledger_at(applied).admit_step(step, 0, 1)
    assert refused.value.reason is reason
    assert refused.value.metadata == {"expected_step": str(applied + 1), "actual_step": str(step)}


@pytest.mark.parametrize("applied", [0, 4])
def test_loads_are_numbered_alike(applied: int) -> None:
    ledger = ledger_at(2, applied)
    assert ledger.admit_load(1, applied + 1, None) is True
    if applied:
        assert ledger.admit_load(1, applied, None) is False
    for load in (applied + 2, applied - 1 if applied else 0):
        with pytest.raises(errors.StepMismatchError) as refused:
            ledger.admit_load(1, load, None)
        assert refused.value.metadata == {"expected_load": str(applied + 1), "actual_load": str(load)}


@pytest.mark.parametrize("step", [5, 6, 2**40])
def test_a_load_may_move_the_step_forward(step: int) -> None:
    ledger = ledger_at(5)
    assert ledger.admit_load(1, 1, step)
    ledger.commit_load(1, step, parameters=False)
    assert (ledger.applied_load, ledger.applied_step) == (1, step)
    assert ledger.admit_step(step + 1, 0, 1) is True


def test_a_load_may_not_move_the_step_back() -> None:
    with pytest.raises(errors.StepMismatchError, match=r"open\.step is 4 and the session is at step 5") as refused:
        ledger_at(5).admit_load(1, 1, 4)
    assert refused.value.reason is Reason.STEP_SUPERSEDED


def test_a_step_that_a_load_has_set_cannot_be_replayed() -> None:
    """There is no record of it: another session took it."""
    ledger = ledger_at(5)
    ledger.commit_load(1, 9, parameters=True)
    with pytest.raises(errors.StepMismatchError):
        ledger.admit_step(9, 0, 1)


def test_a_load_that_leaves_the_step_leaves_its_record() -> None:
    ledger = ledger_at(5)
    for load, step in ((1, None), (2, 5)):
        ledger.commit_load(load, step, parameters=True)
        assert ledger.admit_step(5, 0, 1) is False


def test_only_a_load_of_parameters_makes_a_session_ready() -> None:
    ledger = Ledger(ID, epoch=1, ready=False)
    ledger.worker.take()
    ledger.commit_load(1, None, parameters=False)
    with pytest.raises(errors.SessionNotReadyError, match=ID):
        ledger.admit_step(1, 0, 1)
    ledger.commit_load(2, None, parameters=True)
    assert ledger.admit_step(1, 0, 1) is True
    ledger.commit_load(3, None, parameters=False)
    assert ledger.ready


@pytest.mark.parametrize("token", [0, 2])
def test_only_the_holder_steps_and_loads(token: int) -> None:
    ledger = ledger_at(0)
    with pytest.raises(errors.FencedError):
        ledger.admit_step(1, 0, token)
    with pytest.raises(errors.FencedError):
        ledger.admit_load(token, 1, None)


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_another_epoch_is_stale(epoch: int) -> None:
    with pytest.raises(errors.FencedError, match=f"in epoch 3, the request is of epoch {epoch}") as refused:
        ledger_at(0).admit_step(1, epoch, 1)
    assert refused.value.reason is Reason.STALE_EPOCH
    assert refused.value.metadata == {"epoch": "3", "actual_epoch": str(epoch)}


def test_damage_is_for_ever() -> None:
    ledger = ledger_at(2)
    ledger.damaged_by("step 3")
    for call in (
        lambda: ledger.admit_step(3, 0, 1),
        lambda: ledger.admit_step(2, 0, 1),
        lambda: ledger.admit_load(1, 1, None),
        ledger.check_usable,
    ):
        with pytest.raises(errors.DataLossError, match="damaged when step 3 failed half-way") as refused:
            call()
        assert refused.value.reason is Reason.SESSION_DAMAGED
    ledger.check_open()


def test_a_closed_session_is_not_found() -> None:
    ledger = ledger_at(2)
    ledger.closed = True
    for call in (lambda: ledger.admit_step(3, 0, 1), lambda: ledger.admit_load(1, 1, None), ledger.check_open):
        with pytest.raises(errors.SessionNotFoundError) as refused:
            call()
        assert refused.value.metadata == {"session_id": ID}


def test_an_id_is_shown_escaped_and_cut() -> None:
    error = session_not_found("a\n" * 100)
    assert repr(("a\n" * 100)[:64]) in str(error)
    assert "\n" not in str(error)
    assert len(error.metadata["session_id"]) == 64
