"""The contributions of several workers: what rounds and asynchronous steps have in common.

The key of exactly-once is (worker, number). Each worker numbers its own contributions, and has its own last result. A
contribution counts at its commit. Then it is a part of a step, or it is dropped, and either is its answer.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import msgspec

from stepwire.errors import Reason, StateChangedError, StepMismatchError, StepwireError, UnavailableError
from stepwire_server.aggregation.uploads import Uploader, UploadGate, UploadSlot
from stepwire_server.devices.budget import Reservation
from stepwire_server.records.round_result import RoundResult
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult, StepTimes
from stepwire_server.sessions.commits import Commits
from stepwire_server.sessions.freeze import Freeze
from stepwire_server.sessions.ledger import Ledger
from stepwire_server.sessions.members import Member
from stepwire_server.sessions.progress import Progress
from stepwire_server.sessions.session_lock import SessionLock
from stepwire_server.sessions.state import SessionState
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.check_gradient import GradientCheck
from stepwire_server.steps.reply import ReplyWriter
from stepwire_server.steps.step import Hold, Step

__all__ = ["Contributions", "Parts", "UploadRoom", "again", "not_sent"]


class Parts(NamedTuple):
    """The parts of a session that its steps use."""

    config: SessionConfig
    state: SessionState
    ledger: Ledger
    lock: SessionLock
    progress: Progress
    commits: Commits
    clock: Callable[[], float]


class UploadRoom:
    """The memory of one upload, and its place among the uploads at a time."""

    def __init__(self, reservation: Reservation | None, slot: UploadSlot | None) -> None:
        """Hold both."""
        self._reservation = reservation
        self._slot = slot

    def release(self) -> None:
        """Give both back. Releasing twice is harmless."""
        if self._reservation is not None:
            self._reservation.release()
        if self._slot is not None:
            self._slot.release()


class Contributions(abc.ABC):
    """The door of a session for the contributions of its workers. Thread-safe: it shares the session's lock.

    Attributes:
        aggregation: the way that gradients meet.
        parts: the parts of the session.
        changed: is notified, under the session's lock, when a wait has to look again.
    """

    def __init__(self, parts: Parts) -> None:
        """Use the parts of a session."""
        aggregation = parts.config.aggregation
        assert aggregation is not None
        self.aggregation = aggregation
        self.parts = parts
        self.changed = threading.Condition(cast(Any, parts.lock))  # which has the methods that conditions use
        self._uploads = UploadGate(aggregation.uploads_at_once, parts.clock)
        self._ending: StepwireError | None = None

    @abc.abstractmethod
    def begin(self, request: StepRequest, holder: Holder, began: float, slot: UploadSlot | None) -> Step:
        """Admit a contribution and make room for its gradient; see `Session.begin`."""

    @abc.abstractmethod
    def commit(self, step: Step, writer: ReplyWriter) -> StepResult:
        """Have a contribution count, and wait for its answer; see `Session.commit`."""

    @abc.abstractmethod
    def check(self, step: Step) -> GradientCheck | None:
        """Return the facts that a coordinator decides by; see `Session.check`."""

    @abc.abstractmethod
    def loaded(self) -> None:
        """Forget what was contributed to the state before a load. Under the lock."""

    def rest(self, freeze: Freeze) -> None:
        """Wait no longer for contributions that a freeze does not admit. Under the lock."""
        self.wake()

    def close(self) -> None:
        """Give memory back, and end the waits: the session has ended. Under the lock."""
        self.wake()

    def room(self, request: StepRequest, slot: UploadSlot | None, *, needed: bool) -> UploadRoom:
        """Reserve room for a contribution, or for the rows that it names where its gradient is not needed.

        Raises:
            ResourceExhaustedError: no room just now.
        """
        state = self.parts.state
        return UploadRoom(state.reserve_step(request) if needed else state.reserve_rows(request), slot)

    def begin_again(
        self, request: StepRequest, holder: Hold, told: Sequence[tuple[int, RoundResult]], *, reduced: bool
    ) -> Step:
        """Make a step that needs no admission: of a round, or of the log.

        Args:
            request: the step.
            holder: the hold that it is committed under.
            told: for each worker whose gradient is in it, the part in the result.
            reduced: the gradient is that of a round: float32, unscaled, and in memory that is the round's.
        """
        state, progress = self.parts.state, self.parts.progress
        unscale = 1.0 if reduced else state.unscale(request)
        room = UploadRoom(None, None) if state.arrays.depth == 1 else state.reserve_step(request)
        gradient = state.stage_gradient(request, unscale, room)
        step = Step(request, holder, gradient, replay=False, began=0.0, entry=progress.begin())
        step.parts, step.reduced = tuple(told), reduced
        return step

    def commit_again(self, step: Step, writer: ReplyWriter) -> StepResult:
        """Apply a step of the log, and note its answers."""
        with self.parts.lock:
            return self.apply(step, writer)

    def apply(self, step: Step, writer: ReplyWriter) -> StepResult:
        """Apply a step, and note its answers.

        Raises:
            StepwireError: as `Commits.apply`; the state is as before.
        """
        result = self.parts.commits.apply(step, writer, step.parts[0][1])
        ledger = self.parts.ledger
        for worker, part in step.parts:
            ledger.members[worker].answered(part.contribution, ledger.applied_load, result._replace(round=part))
        self.wake()
        return result

    def upload(self, uploader: Uploader) -> UploadSlot:
        """Wait for a place among the uploads. Without the lock."""
        return self._uploads.slot(uploader)

    def end(self, error: StepwireError) -> None:
        """End every wait with an error, now and from now on. Without the lock."""
        with self.parts.lock:
            self._ending = error
            self.changed.notify_all()

    def let_go(self) -> None:
        """End the waits for clients that have left. Without the lock."""
        with self.parts.lock:
            holders = [member.worker.holder for member in self.parts.ledger.members]
            if any(holder.stream is not None and holder.stream.gone for holder in holders):
                self.wake()

    def wake(self) -> None:
        """Have every wait look again: a worker came or went, or the session has ended."""
        self.changed.notify_all()

    def member(self, step: StepRequest, holder: Hold) -> Member:
        """Return the worker of a contribution, once it may commit one.

        Raises:
            StepwireError: as `Ledger.check_step`.
        """
        self.parts.ledger.check_step(step, holder)
        return self.parts.ledger.members[holder.worker]

    def admit(self, member: Member, number: int) -> bool:
        """Return True for the next contribution of a worker, and False for a replay of the last one.

        Raises:
            StepMismatchError: neither.
            UnavailableError: the session is frozen for a move.
        """
        ledger = self.parts.ledger
        following, freeze = member.admit(number, ledger.applied_load), ledger.freeze
        if following and freeze is not None:
            freeze.check_contribution(member.worker.index, number)
        return following

    def staleness(self, request: StepRequest) -> int:
        """Return the number of steps since the parameters that a gradient was computed from.

        Raises:
            StepMismatchError: that step is not there yet.
        """
        applied = self.parts.ledger.applied_step
        if request.base_step is None:
            return 0
        if request.base_step > applied:
            raise StepMismatchError(
                f"begin.base_step is {request.base_step} and the session is at step {applied}; pull the parameters and "
                "compute the gradient again",
                metadata={"field": "begin.base_step", "applied_step": applied},
            )
        return applied - request.base_step

    def check_waiting(self, step: Step) -> None:
        """Refuse to wait on for a worker that has moved on, or in a session that has ended or is frozen.

        Raises:
            StepwireError: as `Ledger.check_step`, or the error of `end`.
        """
        if self._ending is not None:
            raise again(self._ending)
        ledger = self.parts.ledger
        ledger.check_usable()
        if ledger.freeze is not None:
            ledger.freeze.check_contribution(step.holder.worker, step.contribution)
        worker = ledger.members[step.holder.worker].worker
        worker.check(step.holder)
        if (stream := worker.holder.stream) is not None and stream.gone:
            raise UnavailableError("the client has left; its contribution counts, and nobody waits for the answer")

    def replay(self, member: Member, step: Step, writer: ReplyWriter) -> StepResult:
        """Answer the last contribution again, with the present parameters."""
        result = member.result
        assert result is not None  # that is what made it a replay
        self.parts.commits.reply(step.request._replace(reply_base=None), writer, step.named_rows())
        told, member.told = member.told, True
        return result.replay() if told else result

    def drop(self, member: Member, step: Step, writer: ReplyWriter, staleness: int) -> StepResult:
        """Answer a contribution that comes too late: nothing is applied, and its number is used up."""
        state, ledger, number = self.parts.state, self.parts.ledger, step.contribution
        self.parts.progress.check()
        part = RoundResult(number, dropped=True, members=len(ledger.members.attached), staleness=staleness)
        scale = state.loss_scale
        result = StepResult(
            step=ledger.applied_step,
            epoch=ledger.epoch,
            skipped=False,
            grad_norm=0.0,
            non_finite_count=0,
            groups=(),
            times=StepTimes(step.received - step.began, 0.0, 0.0),
            loss_scale=None if scale is None else scale.scale,
            round=part,
        )
        self.parts.commits.reply(step.request._replace(reply_base=None), writer, step.named_rows())
        member.answered(number, ledger.applied_load, result)
        member.told = True
        self.parts.progress.dropped(step.holder, number, msgspec.msgpack.encode(result))
        self.wake()
        return result


def again(error: StepwireError) -> StepwireError:
    """Return a copy of an error: one that several threads raise gathers traces."""
    return type(error)(
        str(error), reason=error.reason, metadata=error.metadata, retry_after_seconds=error.retry_after_seconds
    )


def not_sent(number: int) -> StateChangedError:
    """Say that the gradient of a contribution is needed after all."""
    return StateChangedError(
        f"contribution {number} was not needed when it began, and is now; send it again", reason=Reason.STATE_CHANGED
    )
