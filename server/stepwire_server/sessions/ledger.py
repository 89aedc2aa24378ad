"""What a session has committed, and who may commit what next. No arrays, no locks: the session has those.

Steps and loads are numbered alike: the next number is admitted, the last one again is a replay, everything else
is refused with the number that would be right.
"""

from __future__ import annotations

from stepwire.errors import (
    DataLossError,
    FencedError,
    Reason,
    SessionNotFoundError,
    SessionNotReadyError,
    StepMismatchError,
)
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.workers import Worker

__all__ = ["Ledger", "session_not_found"]


class Ledger:
    """The numbers of one session.

    Attributes:
        session_id: whose.
        epoch: which incarnation of the server owns the session.
        worker: who holds the session's one worker.
        applied_step: the last committed step; 0 before the first.
        applied_load: the last committed load; 0 before the first.
        durable_step: the last step that survives a loss of the server.
        last_result: what the last step did; None where a load has set the step since.
        ready: parameters have been loaded or were initialised.
        closed: the session has ended.
    """

    def __init__(self, session_id: str, *, epoch: int, ready: bool) -> None:
        """Start at step 0."""
        self.session_id = session_id
        self.epoch = epoch
        self.worker = Worker(0)
        self.applied_step = 0
        self.applied_load = 0
        self.durable_step = 0
        self.last_result: StepResult | None = None
        self.ready = ready
        self.closed = False
        self._answered: int | None = None
        self._damage: str | None = None

    def admit_step(self, step: int, epoch: int, token: int) -> bool:
        """Return True for the next step and False for a replay of the last.

        Raises:
            FencedError: the token or the epoch is not the newest.
            SessionNotFoundError: the session has ended.
            DataLossError: the state is damaged.
            SessionNotReadyError: parameters have not been loaded.
            StepMismatchError: neither the next step nor a replay.
        """
        if epoch != self.epoch:
            self.check_epoch(epoch)
        self.check_usable()
        self.worker.check(token)
        if step == self.applied_step + 1:
            return True
        if step == self.applied_step and self.last_result is not None:
            return False
        raise _mismatch("step", expected=self.applied_step + 1, actual=step)

    def admit_load(self, token: int, load: int, step: int | None) -> bool:
        """Return True for the next load and False for a replay of the last.

        Raises:
            FencedError, SessionNotFoundError, DataLossError: as `admit_step`.
            StepMismatchError: neither, or `step` would go back.
        """
        self.check_open()
        self._check_undamaged()
        self.worker.check(token)
        if load == self.applied_load and load > 0:
            return False
        if load != self.applied_load + 1:
            raise _mismatch("load", expected=self.applied_load + 1, actual=load)
        if step is not None and step < self.applied_step:
            raise StepMismatchError(
                f"open.step is {step} and the session is at step {self.applied_step}; step numbers never go back: "
                "load without a step, or into a new session",
                reason=Reason.STEP_SUPERSEDED,
                metadata={"field": "open.step", "expected_step": self.applied_step, "actual_step": step},
            )
        return True

    def commit_step(self, record: StepResult) -> None:
        """Note an applied step."""
        self.last_result = record
        self.applied_step = self._answered = record.step

    def commit_load(self, load: int, step: int | None, *, parameters: bool) -> None:
        """Note an applied load; `parameters` says that it brought them."""
        self.applied_load, self._answered = load, None
        self.ready = self.ready or parameters
        if step is not None and step != self.applied_step:
            self.applied_step, self.last_result = step, None

    def answered(self, step: int) -> bool:
        """Tell whether a client that has the answer to `step` has the present parameters."""
        return step == self._answered

    def damaged_by(self, what: str) -> None:
        """Refuse everything from now on: `what` failed while it was changing the state."""
        self._damage = what

    def check_usable(self) -> None:
        """Refuse when there is no sound state to step or read.

        Raises:
            SessionNotFoundError, DataLossError, SessionNotReadyError: as `admit_step`.
        """
        if self.closed or self._damage is not None:
            self.check_sound()
        if not self.ready:
            raise SessionNotReadyError(
                f"session {self.session_id} has no parameters yet; load the slot 'param' first",
                metadata={"session_id": self.session_id},
            )

    def check_sound(self) -> None:
        """Refuse when there is no state, or a damaged one.

        Raises:
            SessionNotFoundError, DataLossError: as `admit_step`.
        """
        self.check_open()
        self._check_undamaged()

    def check_open(self) -> None:
        """Refuse when the session has ended.

        Raises:
            SessionNotFoundError: it has.
        """
        if self.closed:
            raise session_not_found(self.session_id)

    def check_epoch(self, epoch: int) -> None:
        """Refuse a request of another epoch; 0 skips the check.

        Raises:
            FencedError: STALE_EPOCH.
        """
        if epoch not in (0, self.epoch):
            raise FencedError(
                f"session {self.session_id} is in epoch {self.epoch}, the request is of epoch {epoch}; attach again",
                reason=Reason.STALE_EPOCH,
                metadata={"epoch": self.epoch, "actual_epoch": epoch},
            )

    def _check_undamaged(self) -> None:
        if self._damage is not None:
            raise DataLossError(
                f"session {self.session_id} was damaged when {self._damage} failed half-way; load its last good "
                "state into a new session",
                metadata={"session_id": self.session_id},
            )


def session_not_found(session_id: str) -> SessionNotFoundError:
    """Say that a session does not exist, with the id as it was sent."""
    return SessionNotFoundError(
        f"session {session_id[:64]!r} does not exist here: it was never created, was closed, its lease ran out, or "
        "its server was restarted; create a new one and load your last saved state",
        metadata={"session_id": session_id[:64]},
    )


def _mismatch(what: str, *, expected: int, actual: int) -> StepMismatchError:
    old = actual < expected
    return StepMismatchError(
        f"{what} {actual} {'was applied long ago' if old else 'is too far ahead'}; the next {what} is {expected}",
        reason=Reason.STEP_SUPERSEDED if old else Reason.STEP_MISMATCH,
        metadata={f"expected_{what}": expected, f"actual_{what}": actual},
    )
