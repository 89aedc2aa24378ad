"""A step that is applied while it arrives.

The effect of such a step on an element depends on that element alone, once nothing has to be known of the whole
gradient. So each chunk is applied and replied to when it comes, and the last replies leave while the next chunks are
received. The price is atomicity: a stream that breaks off leaves the step half applied. Each range therefore has a
mark, and the step is finished by being sent again: a marked range goes back as it is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from fractions import Fraction

from stepwire.errors import Reason, SessionNotReadyError, StateChangedError
from stepwire.optimizers.norms import gradient_norms
from stepwire_server.durability.entries import Attempt
from stepwire_server.durability.session_log import EntryLog
from stepwire_server.engines.protocol import Range
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.steps.check_gradient import GradientCheck
from stepwire_server.steps.gradient import StagedChunk
from stepwire_server.steps.reply import ReplyPipeline, split_range
from stepwire_server.steps.result import Effect, Moment, step_result
from stepwire_server.steps.step import Step, SteppedState
from stepwire_server.steps.update import Update, effective_groups, passes

__all__ = ["Marks", "OverlappedStep", "unfinished"]


class Marks:
    """The elements that have been applied: disjoint ranges in order, neighbours merged."""

    def __init__(self) -> None:
        """Start with none."""
        self._ranges: list[Range] = []

    def without(self, start: int, end: int) -> list[Range]:
        """Return the ranges of `[start, end)` that have no mark, in order."""
        missing, done = list[Range](), start
        for low, high in self._ranges[bisect_right(self._ranges, start, key=_end) :]:
            if low >= end:
                break
            if done < low:
                missing.append((done, low))
            done = high
        return [*missing, (done, end)] if done < end else missing

    def add(self, start: int, end: int) -> None:
        """Mark `[start, end)`."""
        first = bisect_left(self._ranges, start, key=_end)
        last = bisect_right(self._ranges, end, key=_start)
        if first < last:
            start, end = min(start, self._ranges[first][0]), max(end, self._ranges[last - 1][1])
        self._ranges[first:last] = [(start, end)]


class OverlappedStep:
    """One step on its way into the state, in as many attempts as it takes. The session serialises its calls.

    Attributes:
        number: the step's number.
        selection: the tensors that it moves.
    """

    def __init__(self, request: StepRequest, state: SteppedState) -> None:
        """Compute the numbers of the step; nothing is changed.

        Raises:
            InvalidRequestError: a scheduled learning rate is out of range.
        """
        config = state.config
        self.number = request.step
        self.selection = config.without(request.missing)
        self._state = state
        self._settings = _settings(request)
        self._groups = effective_groups(config, request, state.tensor_steps.group_steps())
        segments = state.tensor_steps.segments(self.selection)
        steps = passes(config, self._groups, segments, 1.0 / request.loss_scale, (1.0,) * len(self._groups))
        self._update = Update(state.arrays, steps, len(self._groups))
        self._marks = Marks()
        self._entries: list[EntryLog] = []

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The chunks that were applied, attempt by attempt, for a log."""
        return tuple(Attempt(entry.entry, entry.applied) for entry in self._entries)

    @property
    def first_record(self) -> int | None:
        """The number of the first record of these chunks in the log; None without one."""
        return min((entry.first for entry in self._entries if entry.first), default=None)

    def check_continued_by(self, request: StepRequest) -> None:
        """Refuse a step that is not this one.

        Raises:
            SessionNotReadyError: STEP_UNFINISHED.
        """
        if not request.overlap or _settings(request) != self._settings:
            raise unfinished(self.number, "send it again, with `overlap` and the same hyper-parameters")

    def apply(self, step: Step, chunk: StagedChunk, reply: ReplyPipeline) -> None:
        """Apply the ranges of a chunk that have no mark, and reply with all of it."""
        request = step.request
        if (entry := step.entry) is not None:
            if entry not in self._entries:
                self._entries.append(entry)
            entry.applied += 1
        self._state.before_change(chunk.offset, chunk.end)
        for low, high in split_range(chunk.offset, chunk.end, request.reply_elements):
            out = reply.writer.buffer(low, high - low) if request.reply else None
            asked, done = [], low
            for start, end in self._marks.without(low, high):
                target = None if out is None else out[start - low : end - low]
                asked += self._update.read(done, start, low, out)
                asked += self._update.apply(chunk.gradient, chunk.offset, start, end, target)
                done = end
            asked += self._update.read(done, high, low, out)
            self._marks.add(low, high)
            if out is not None:
                reply.add(asked)

    def check(self, step: Step) -> GradientCheck:
        """Check that the attempt that finishes has brought everything, and measure it.

        The sums of squares are those of this attempt. Their chunks are gone, so about once in a million steps the norm
        is one float32 further from the exact one than elsewhere.

        Raises:
            InvalidRequestError: the chunks do not cover the step's segments; the step stays unfinished.
            StateChangedError: a segment has no mark: a load came between.
        """
        gradient = step.gradient
        gradient.complete()
        if any(self._marks.without(start, end) for start, end, _ in self.selection.segments):
            raise StateChangedError(
                f"step {self.number}: the state was replaced while the step arrived, and a part of it was not applied; "
                "send the step again",
                metadata={"unfinished_step": self.number},
            )
        sums = gradient.squared_norms()

        def nearly(groups: Sequence[int]) -> Fraction:
            return sum((Fraction(sums[group]) for group in groups), Fraction())

        norms = gradient_norms(sums, nearly, None, [None] * len(sums), "torch")
        count = gradient.non_finite_count
        return GradientCheck(self._groups, True, sums, norms, not count, count)

    def result(self, check: GradientCheck, moment: Moment) -> StepResult:
        """Return the step's result, once the state has counted it."""
        return step_result(self._state, check, Effect.UPDATED, self._update.norms(), moment)


def unfinished(step: int, remedy: str) -> SessionNotReadyError:
    """Return the error of a step that is half applied."""
    return SessionNotReadyError(
        f"step {step} was broken off half applied: {remedy}, or load a whole state with its step",
        reason=Reason.STEP_UNFINISHED,
        metadata={"unfinished_step": step},
    )


def _settings(request: StepRequest) -> tuple[object, ...]:
    return request.groups, request.own_lr, request.loss_scale, request.missing


def _start(marked: Range) -> int:
    return marked[0]


def _end(marked: Range) -> int:
    return marked[1]
