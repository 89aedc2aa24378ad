"""The steps of a session with one worker: admitted, staged, committed whole or not at all, and replayed."""

from __future__ import annotations

from collections.abc import Callable

from stepwire.errors import StateChangedError
from stepwire_server.aggregation.uploads import UploadSlot
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult, StepTimes
from stepwire_server.sessions.calls_under_way import LastUse
from stepwire_server.sessions.contributions import Parts
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.check_gradient import GradientCheck, check_gradient
from stepwire_server.steps.gradient import StagedChunk
from stepwire_server.steps.overlap import unfinished
from stepwire_server.steps.reply import ReplyPipeline, ReplyWriter
from stepwire_server.steps.result import Effect, Moment
from stepwire_server.steps.step import Hold, Step

__all__ = ["OwnSteps"]


class OwnSteps:
    """The steps of one worker; `Session` documents the calls. Thread-safe: it shares the session's lock."""

    def __init__(self, parts: Parts, last_use: LastUse, step_over: Callable[[], object]) -> None:
        """Use the parts of a session.

        Args:
            parts: the parts.
            last_use: notes each call.
            step_over: called at the end of an overlapped step, under the lock.
        """
        self._state = parts.state
        self._ledger = parts.ledger
        self._lock = parts.lock
        self._progress = parts.progress
        self._commits = parts.commits
        self._clock = parts.clock
        self._last_use = last_use
        self._step_over = step_over

    def begin(self, request: StepRequest, holder: Holder, began: float, slot: UploadSlot | None) -> Step:
        """See `Session.begin`."""
        with self._lock:
            replay = not self._admit(request, holder)
            state, unscale = self._state, self._state.unscale(request)
            entry = None if replay else self._progress.begin(at_once=request.overlap)
        reply = request.reply_dtype if request.reply else None
        state.prepare(request.groups, request.gradient_dtype, reply, rows=request.reply_rows)
        return Step(request, holder, state.stage_gradient(request, unscale), replay=replay, began=began, entry=entry)

    def commit(self, step: Step, writer: ReplyWriter) -> StepResult:
        """See `Session.commit`."""
        with self._lock:
            result, mark = self._commit(step, writer), self._progress.last
        self._progress.settle_step(step, mark)
        return result

    def check(self, step: Step) -> GradientCheck | None:
        """See `Session.check`."""
        with self._lock:
            if not self._admit(step.request, step.holder, whole=True):
                return None
            if step.replay:
                raise _no_replay(step.request)
            return check_gradient(step, self._state)

    def apply(self, step: Step, chunk: StagedChunk, reply: ReplyPipeline) -> None:
        """See `Session.apply`."""
        with self._lock:
            self._admit_overlapped(step)
            overlapped = self._state.unfinished = self._state.overlapped(step.request)
            with self._ledger.changing("step", step.request.step):
                overlapped.apply(step, chunk, reply)

    def finish(self, step: Step) -> StepResult:
        """See `Session.finish`."""
        with self._lock:
            self._admit_overlapped(step)
            overlapped = self._state.overlapped(step.request)
            check = overlapped.check(step)
            self._state.unfinished = None
            self._state.advance(step.gradient, Effect.UPDATED, check.groups)
            moment = Moment(overlapped.number, self._ledger.epoch, StepTimes(self._clock() - step.began, 0.0, 0.0))
            result = self._commits.note(step, overlapped.result(check, moment), overlapped.attempts)
            self._step_over()
            mark = self._progress.last
        self._progress.settle_step(step, mark)
        return result

    def _commit(self, step: Step, writer: ReplyWriter) -> StepResult:
        if not self._admit(step.request, step.holder, whole=True):
            return self._replay(step, writer)
        if step.replay:
            raise _no_replay(step.request)
        return self._commits.apply(step, writer)

    def _admit(self, request: StepRequest, holder: Hold, *, whole: bool = False) -> bool:
        """Return False for a replay; `whole` says that the step will not go on with one that is half applied."""
        self._last_use.at = self._clock()
        following = self._ledger.admit_step(request, holder)
        half = self._state.unfinished
        if half is not None:
            if not following:  # the parameters are of no step just now
                raise unfinished(half.number, "finish it")
            half.check_continued_by(request._replace(overlap=request.overlap and not whole))
        return following

    def _admit_overlapped(self, step: Step) -> None:
        if not self._admit(step.request, step.holder):
            raise StateChangedError(f"step {step.request.step} was committed while it was sent; send it again")

    def _replay(self, step: Step, writer: ReplyWriter) -> StepResult:
        assert self._ledger.last_result is not None  # that is what made it a replay
        self._commits.reply(step.request, writer, step.named_rows())
        return self._ledger.last_result.replay()


def _no_replay(request: StepRequest) -> StateChangedError:
    return StateChangedError(f"step {request.step} was a replay when it began and is not now; send it again")
