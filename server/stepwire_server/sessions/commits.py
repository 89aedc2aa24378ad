"""The commits of a session: a step that is admitted is applied, numbered, logged and told, in this order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from stepwire_server.durability.entries import Attempt
from stepwire_server.observability.commits import tell
from stepwire_server.records.committed import CommitSink, Committed
from stepwire_server.records.round_result import RoundResult
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult, StepTimes
from stepwire_server.sessions.ledger import Ledger
from stepwire_server.sessions.progress import Progress
from stepwire_server.sessions.state import SessionState
from stepwire_server.steps.commit import Commit
from stepwire_server.steps.reply import ReplyPipeline, ReplyWriter, reply_parameters
from stepwire_server.steps.result import Moment
from stepwire_server.steps.row_gradients import NamedRows
from stepwire_server.steps.row_update import reply_rows
from stepwire_server.steps.step import Hold, Step

__all__ = ["Commits"]


class Commits:
    """The commits of one session. The session serialises its calls.

    It does not refer to the session: a cycle would keep the memory of one that has ended until the collector runs.
    """

    def __init__(
        self,
        state: SessionState,
        ledger: Ledger,
        progress: Progress,
        clock: Callable[[], float],
        sinks: Sequence[CommitSink],
    ) -> None:
        """Commit to a state; `sinks` are told of each commit."""
        self._state = state
        self._ledger = ledger
        self._progress = progress
        self._clock = clock
        self._sinks = tuple(sinks)

    @contextlib.contextmanager
    def untold(self) -> Iterator[None]:
        """Tell no sink of the commits in a block: they are made again, and were told before."""
        sinks, self._sinks = self._sinks, ()
        try:
            yield
        finally:
            self._sinks = sinks

    def apply(self, step: Step, writer: ReplyWriter, part: RoundResult | None = None) -> StepResult:
        """Apply a step that is admitted, whole or not at all; the parameters go to `writer`.

        Args:
            step: the step.
            writer: the place of the reply.
            part: what the result tells of the contributions in it; None without aggregation.

        Raises:
            InvalidRequestError: the chunks do not cover the space; the state is as before.
            NonFiniteGradientError: under the policy `reject`; the state is as before.
            DataLossError: nothing can become durable; the state is as before.
        """
        self._progress.check()
        if step.request.reply_base is not None and not self._ledger.replied(step.request.reply_base):
            step.request = step.request._replace(reply_base=None)
        commit, started = Commit(step, self._state), self._clock()
        if not (changes := commit.changes):
            commit.apply(writer)
        with self._ledger.changing("step", step.request.step):
            if changes:
                commit.apply(writer)
            self._state.advance(step.gradient, commit.effect, commit.groups)
            receive, queue = step.received - step.began, started - step.received
            times = StepTimes(receive, queue, self._clock() - started, step.reduce_seconds)
            result = commit.result(Moment(step.request.step, self._ledger.epoch, times))
        return self.note(step, result if part is None else result._replace(round=part))

    def note(self, step: Step, result: StepResult, attempts: tuple[Attempt, ...] = ()) -> StepResult:
        """Note a step that has been applied, append it to the log, and tell the sinks."""
        self._ledger.commit_step(result)
        self._progress.step_committed(step, attempts)
        self._tell(step.request, step.holder, result, step.parts)
        return result

    def note_of_lane(self, request: StepRequest, holder: Hold, result: StepResult) -> None:
        """Note a step that a compiled lane has made, of a session without a log, and tell the sinks."""
        self._ledger.commit_step(result)
        self._tell(request, holder, result, ())

    def _tell(
        self, request: StepRequest, holder: Hold, result: StepResult, parts: Sequence[tuple[int, RoundResult]]
    ) -> None:
        if self._sinks:
            origin = (self._ledger.session_id, holder.worker, self._ledger.applied_load, request)
            tell(self._sinks, Committed(*origin, result, holder.transport, parts))

    def reply(self, request: StepRequest, writer: ReplyWriter, rows: Sequence[NamedRows] = ()) -> None:
        """Reply with the present parameters, and with some rows of tables."""
        reply_parameters(self._state.arrays, self._state.config.layout, request, writer)
        self.reply_rows(request, writer, rows)

    def reply_rows(self, request: StepRequest, writer: ReplyWriter, rows: Sequence[NamedRows]) -> None:
        """Reply with some rows of tables as they are."""
        with ReplyPipeline(writer, self._state.arrays.depth) as reply:
            reply_rows(self._state.arrays, request, rows, reply)
