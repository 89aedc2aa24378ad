"""The numbers of a session: its last commits, and the admission of the next. Arrays and locks are the session's.

Steps and loads are numbered alike: the next number is admitted, the last one again is a replay, everything else
is refused with the number that would be right.
"""

from __future__ import annotations

from types import TracebackType

from stepwire.errors import (
    DataLossError,
    FencedError,
    Reason,
    SessionNotFoundError,
    SessionNotReadyError,
    StateChangedError,
    StepMismatchError,
    UnavailableError,
)
from stepwire_server.engines.protocol import PARAM
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.freeze import Freeze
from stepwire_server.sessions.members import Members
from stepwire_server.sessions.workers import Worker
from stepwire_server.steps.step import Hold

_PARKED_SECONDS = 0.01

__all__ = ["Ledger", "session_not_found", "session_parked"]


class Ledger:
    """The numbers of one session.

    Attributes:
        session_id: the session's id.
        epoch: the incarnation of the server that owns the session.
        members: the session's workers, with their holders.
        applied_step: the last committed step; 0 before the first.
        applied_load: the last committed load; 0 before the first.
        durable_step: the last step that survives a loss of the server.
        kept_step: the last step that the disk had when the session came into memory.
        last_result: the last step's result; None where a load has set the step since.
        ready: parameters have been loaded or were initialised.
        closed: the session has ended, in this object at least.
        parked: the session lives on, on disk or elsewhere.
        freeze: the rest of the session for a move; None for none.
    """

    def __init__(self, session_id: str, *, epoch: int, ready: bool, workers: int = 1) -> None:
        """Start at step 0, for so many workers at most."""
        self.session_id = session_id
        self.epoch = epoch
        self.members = Members(workers)
        self.applied_step = 0
        self.applied_load = 0
        self.durable_step = self.kept_step = 0
        self.last_result: StepResult | None = None
        self.ready = ready
        self.closed = self.parked = False
        self.freeze: Freeze | None = None
        self._replied: int | None = None
        self._damage: str | None = None
        self._loss: DataLossError | None = None

    @property
    def worker(self) -> Worker:
        """Worker 0, the only one without aggregation."""
        return self.members[0].worker

    @property
    def damaged(self) -> bool:
        """The state is half changed, or its device is lost."""
        return self._damage is not None or self._loss is not None

    @property
    def attached(self) -> bool:
        """A stream is attached."""
        return any(member.worker.attached for member in self.members)

    def admit_step(self, request: StepRequest, holder: Hold) -> bool:
        """Return True for the next step and False for a replay of the last.

        Raises:
            FencedError: the holder or the epoch is not the newest.
            UnavailableError: a newer stream of the same client holds the worker, or the session is frozen.
            SessionNotFoundError: the session has ended.
            DataLossError: the state is damaged.
            SessionNotReadyError: parameters have not been loaded.
            StateChangedError: the last load is not the one that the client knows.
            StepMismatchError: neither the next step nor a replay.
        """
        self.check_step(request, holder)
        if request.step == self.applied_step + 1:
            if self.freeze is not None:
                self.freeze.check_step(request.step)
            return True
        if request.step == self.applied_step and self.last_result is not None:
            return False
        raise _mismatch("step", expected=self.applied_step + 1, actual=request.step)

    def check_step(self, request: StepRequest, holder: Hold) -> None:
        """Refuse a step, whatever its number, that is not of the present holder, epoch and load.

        Raises:
            StepwireError: as `admit_step`, but for StepMismatchError.
        """
        if request.epoch != self.epoch:
            self.check_epoch(request.epoch)
        if self.closed or self._damage is not None or not self.ready:
            self.check_usable()
        if not self.members.is_held_by(holder):
            self.members[holder.worker].worker.check(holder)
        if request.load is not None and request.load != self.applied_load:
            raise self._other_load(request.load)

    def admit_load(self, request: LoadRequest, holder: Hold) -> bool:
        """Return True for the next load and False for a replay: of the last one, or of the last one of this worker.

        Raises:
            FencedError, UnavailableError, SessionNotFoundError, DataLossError: as `admit_step`.
            StepMismatchError: neither, or its step would go back.
        """
        self.check_epoch(request.epoch)
        self.check_sound()
        self.members[holder.worker].worker.check(holder)
        if request.load > 0 and request.load in (self.applied_load, self.members[holder.worker].loaded):
            return False
        if not self.members.follows(request.load, self.applied_load):
            mismatch = _mismatch("load", expected=self.applied_load + 1, actual=request.load)
            if self.members.most > 1:
                mismatch.metadata["worker_load"] = str(self.members[holder.worker].loaded)
            raise mismatch
        if self.freeze is not None:
            self.freeze.check_load(request.load)
        if request.step is not None and request.step < self.applied_step:
            raise StepMismatchError(
                f"open.step is {request.step} and the session is at step {self.applied_step}; step numbers never go "
                "back: load without a step, or into a new session",
                reason=Reason.STEP_SUPERSEDED,
                metadata={"field": "open.step", "expected_step": self.applied_step, "actual_step": request.step},
            )
        return True

    def commit_step(self, result: StepResult) -> None:
        """Note an applied step."""
        self.last_result = result
        self.applied_step = self._replied = result.step

    def commit_load(self, request: LoadRequest, holder: Hold) -> None:
        """Note an applied load, and whose it was."""
        self.applied_load, self._replied = request.load, None
        self.members[holder.worker].loaded = request.load
        self.ready = self.ready or PARAM in request.slots
        if request.step is not None and request.step != self.applied_step:
            self.applied_step, self.last_result = request.step, None

    def restore(self, step: int, load: int, *, ready: bool, last_result: StepResult | None) -> None:
        """Go on from the numbers of an earlier server."""
        self.applied_step, self.applied_load, self.ready, self.last_result = step, load, ready, last_result

    def lead(self, epoch: int) -> None:
        """Go on in a newer epoch: all holders attach again, and no step is lost that they knew to be durable."""
        self.epoch, self.kept_step = epoch, self.applied_step
        for member in self.members:
            member.worker.restore(member.worker.holder.acquired, epoch)

    def replied(self, step: int) -> bool:
        """Tell whether a client that has the reply to `step` has the present parameters."""
        return step == self._replied

    def check_durable(self, durable_step: int) -> None:
        """Refuse a client that knows a later step to be durable than this server does.

        Raises:
            DataLossError: DURABLE_STEP_LOST.
        """
        if durable_step > max(self.durable_step, self.kept_step):
            raise DataLossError(
                f"session {self.session_id} is durable up to step {self.durable_step} here, and the client knows step "
                f"{durable_step} to be durable; this server has lost steps, so load your own state into a new session",
                reason=Reason.DURABLE_STEP_LOST,
                metadata={"durable_step": self.durable_step, "known_durable_step": durable_step},
            )

    def changing(self, what: str, number: int) -> _Changing:
        """Change the state for a block; if something fails in it, the session refuses everything from then on."""
        return _Changing(self, what, number)

    def note_damage(self, what: str, error: BaseException) -> None:
        """Refuse everything from now on: an error has come in the middle of a change."""
        self._damage = what
        if isinstance(error, DataLossError):
            self._loss = DataLossError(str(error), reason=error.reason, metadata=error.metadata)

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
            UnavailableError: it was parked while this caller was on its way.
        """
        if self.closed and self.parked:
            raise session_parked(self.session_id)
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

    def _other_load(self, load: int) -> StateChangedError:
        return StateChangedError(
            f"the step is for the state of load {load}, and the session's last load is {self.applied_load}; nothing "
            "was applied, pull the parameters and compute the gradient again",
            metadata={"load": load, "applied_load": self.applied_load},
        )

    def _check_undamaged(self) -> None:
        if (loss := self._loss) is not None:  # a copy, because an error that is raised twice gathers traces
            raise DataLossError(str(loss), reason=loss.reason, metadata=loss.metadata)
        if self._damage is not None:
            raise DataLossError(
                f"session {self.session_id} was damaged when {self._damage} failed half-way; load its last good "
                "state into a new session",
                metadata={"session_id": self.session_id},
            )


class _Changing:
    """The block of one change; see `Ledger.changing`."""

    __slots__ = ("_ledger", "_number", "_what")

    def __init__(self, ledger: Ledger, what: str, number: int) -> None:
        self._ledger = ledger
        self._what = what
        self._number = number

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._ledger.note_damage(f"{self._what} {self._number}", error)


def session_not_found(session_id: str) -> SessionNotFoundError:
    """Say that a session does not exist, with the id as it was sent."""
    return SessionNotFoundError(
        f"session {session_id[:64]!r} does not exist here: it was never created, was closed, its lease ran out, or "
        "its server was restarted; create a new one and load your last saved state",
        metadata={"session_id": session_id[:64]},
    )


def session_parked(session_id: str) -> UnavailableError:
    """Say that a session has left memory while its caller was on the way."""
    return UnavailableError(
        f"session {session_id} was parked just now; call again, and it comes back",
        reason=Reason.SHUTTING_DOWN,
        retry_after_seconds=_PARKED_SECONDS,
    )


def _mismatch(what: str, *, expected: int, actual: int) -> StepMismatchError:
    old = actual < expected
    return StepMismatchError(
        f"{what} {actual} {'was applied long ago' if old else 'is too far ahead'}; the next {what} is {expected}",
        reason=Reason.STEP_SUPERSEDED if old else Reason.STEP_MISMATCH,
        metadata={f"expected_{what}": expected, f"actual_{what}": actual},
    )
