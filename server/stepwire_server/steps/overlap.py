"""A step that is applied while it arrives.

What a step does to an element depends on that element alone, once nothing has to be known of the whole gradient. So
each chunk is applied and answered when it comes, and the last answers leave while the next chunks are received. The
price is atomicity: a stream that breaks off leaves the step half applied. Each range therefore has a mark, and the step
is finished by being sent again: what has its mark is answered as it is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from fractions import Fraction

from stepwire.errors import Reason, SessionNotReadyError
from stepwire.optimizers.norms import gradient_norms
from stepwire_server.engines.protocol import EngineState, Range
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import Outcome, updated
from stepwire_server.steps.gradient import GradientStaging, StagedChunk
from stepwire_server.steps.reply import ReplyPipeline, ReplyWriter, split_range
from stepwire_server.steps.tensor_steps import TensorSteps
from stepwire_server.steps.update import effective_groups, passes
from stepwire_server.steps.updating import Update

__all__ = ["Marks", "OverlappedStep"]


class Marks:
    """Which elements have been applied: disjoint spans in order, neighbours merged."""

    def __init__(self) -> None:
        """Start with none."""
        self._spans: list[Range] = []

    def without(self, start: int, end: int) -> list[Range]:
        """Return the parts of `[start, end)` that have no mark, in order."""
        parts, done = list[Range](), start
        for low, high in self._spans[bisect_right(self._spans, start, key=_end) :]:
            if low >= end:
                break
            if done < low:
                parts.append((done, low))
            done = high
        return [*parts, (done, end)] if done < end else parts

    def add(self, start: int, end: int) -> None:
        """Mark `[start, end)`."""
        first = bisect_left(self._spans, start, key=_end)
        last = bisect_right(self._spans, end, key=_start)
        if first < last:
            start, end = min(start, self._spans[first][0]), max(end, self._spans[last - 1][1])
        self._spans[first:last] = [(start, end)]


class OverlappedStep:
    """One step on its way into the state, in as many attempts as it takes. The session serialises its calls."""

    def __init__(self, config: SessionConfig, request: StepRequest, state: EngineState, progress: TensorSteps) -> None:
        """Compute the numbers of the step; nothing is changed.

        Raises:
            InvalidRequestError: a scheduled learning rate is out of range.
        """
        self.step = request.step
        self.active = config.without(request.missing)
        self._config = config
        self._settings = _settings(request)
        self._groups = effective_groups(config, request, progress.group_steps())
        runs = progress.runs(self.active)
        steps = passes(config, self._groups, runs, 1.0 / request.loss_scale, (1.0,) * len(self._groups))
        self._update = Update(state, steps, len(self._groups))
        self._marks = Marks()

    def check_continued_by(self, request: StepRequest) -> None:
        """Refuse a step that is not this one.

        Raises:
            SessionNotReadyError: STEP_UNFINISHED.
        """
        if not request.overlap or _settings(request) != self._settings:
            raise unfinished(self.step, "take it again, with `overlap` and the same hyper-parameters")

    def apply(self, chunk: StagedChunk, request: StepRequest, sink: ReplyWriter, answer: ReplyPipeline) -> None:
        """Apply what of a chunk has no mark, and answer all of it."""
        for low, high in split_range(chunk.offset, chunk.end, request.reply_elements):
            out = sink.buffer(low, high - low) if request.reply else None
            asked, done = [], low
            for start, end in self._marks.without(low, high):
                target = None if out is None else out[start - low : end - low]
                asked += self._update.answer(done, start, low, out)
                asked += self._update.step(chunk.gradient, chunk.offset, start, end, target)
                done = end
            asked += self._update.answer(done, high, low, out)
            self._marks.add(low, high)
            if out is not None:
                answer.add(asked)

    def finish(self, staging: GradientStaging) -> Outcome:
        """Check that everything has come and return what the step did.

        The sums of squares are those of the attempt that finishes, which brings everything. Their chunks are gone, so
        about once in a million steps the norm is one float32 further from the exact one than elsewhere.

        Raises:
            InvalidRequestError: the chunks do not cover what they must; the step stays unfinished.
        """
        staging.complete()
        sums = staging.squared_norms()

        def nearly(groups: Sequence[int]) -> Fraction:
            return sum((Fraction(sums[group]) for group in groups), Fraction())

        norms = gradient_norms(sums, nearly, None, [None] * len(sums), "torch")
        return updated(self._config, self._groups, norms, self._update.norms(), staging.non_finite_count)


def unfinished(step: int, remedy: str) -> SessionNotReadyError:
    """Say that a step is half applied."""
    return SessionNotReadyError(
        f"step {step} was broken off half applied: {remedy}, or load a whole state with its step",
        reason=Reason.STEP_UNFINISHED,
        metadata={"unfinished_step": step},
    )


def _settings(request: StepRequest) -> tuple[object, ...]:
    return request.groups, request.own_lr, request.loss_scale, request.missing


def _start(span: Range) -> int:
    return span[0]


def _end(span: Range) -> int:
    return span[1]
