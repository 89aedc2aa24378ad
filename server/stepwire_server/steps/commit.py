"""The commit of a step, once it has been admitted and everything has arrived.

`Commit` checks everything when it is made, and changes nothing. `apply` then changes the state, range by range. Each
range's reply is encoded in the same pass that updates it.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepwire.errors import NonFiniteGradientError
from stepwire.optimizers import Hyperparameters
from stepwire_server.records.step_result import StepResult
from stepwire_server.rules import ACCUMULATED
from stepwire_server.steps.check_gradient import GradientCheck, check_gradient
from stepwire_server.steps.dense_rows import dense_ranges
from stepwire_server.steps.reply import ReplyPipeline, ReplyWriter, reply_parameters, reply_ranges, split_range
from stepwire_server.steps.result import Effect, Moment, step_result
from stepwire_server.steps.row_update import RowUpdate, reply_rows, row_updates
from stepwire_server.steps.step import Step, SteppedState
from stepwire_server.steps.tensor_steps import CountedSegment
from stepwire_server.steps.update import SegmentPass, Update, gradient_factor, passes, treatment_scalars, trusted

__all__ = ["Commit"]


class Commit:
    """One step on its way into the state.

    Attributes:
        effect: the effect that it has.
    """

    def __init__(self, step: Step, state: SteppedState) -> None:
        """Check that the step can be applied, and compute its numbers; nothing is changed.

        Raises:
            InvalidRequestError, NonFiniteGradientError: as `check_gradient`.
        """
        self._step, self._state = step, state
        self._check = check = check_gradient(step, state)
        self.effect = self._decide(check)
        self._measured: list[list[float]] = []
        if self.effect is Effect.UPDATED:
            config, gradient = state.config, step.gradient
            segments = state.tensor_steps.segments(gradient.selection)
            stepped = passes(config, check.groups, segments, gradient.unscale, check.norms.coefficients)
            self._segments = stepped
            if config.layout.tables:
                places = {tensor.offset for tensor in config.layout.tables.values()}
                self._segments = [each for each in stepped if each.start not in places]
            self._tables = self._row_updates(stepped, segments) if gradient.rows is not None else []
            if config.rule.direction is not None:
                self._segments = trusted(self._segments, check.groups, gradient, state.arrays)

    @property
    def changes(self) -> bool:
        """The state changes: a step that is skipped changes nothing, unless it drops an accumulation."""
        return self.effect is not Effect.SKIPPED or self._state.config.treatment.accumulation_steps > 1

    @property
    def groups(self) -> Sequence[Hyperparameters]:
        """The numbers that the step uses."""
        return self._check.groups

    def _row_updates(self, stepped: Sequence[SegmentPass], segments: Sequence[CountedSegment]) -> list[RowUpdate]:
        """Return the updates of the tables that move; a table is a segment."""
        gradient, check, config = self._step.gradient, self._check, self._state.config
        assert gradient.rows is not None
        dense = {each.start: each.step for each in stepped}

        def before(group: int) -> list[float]:
            clip = check.norms.coefficients[group]
            return treatment_scalars(config, check.groups[group], gradient.unscale, clip)

        counted = {segment.start: segment for segment in segments}
        return row_updates(self._state, check.groups, counted, gradient.rows, dense, before)

    def _decide(self, check: GradientCheck) -> Effect:
        decision, allowed = self._step.decision, self._state.config.treatment.policy == "allow"
        if not check.updates:  # whatever it holds: the sum tells the last step of the accumulation
            return Effect.ACCUMULATED
        if decision is not None and decision.skip:
            return Effect.SKIPPED
        if not (check.finite or allowed):
            if decision is not None:  # the coordinator has seen a finite gradient, so this is another one
                raise NonFiniteGradientError(
                    f"step {self._step.request.step}: the decision is to apply, and this gradient holds NaN or Inf "
                    f"({check.non_finite_count} elements); nothing was applied. Repeat the step with its own gradient",
                    metadata={"non_finite_count": check.non_finite_count},
                )
            return Effect.SKIPPED
        return Effect.UPDATED

    def apply(self, writer: ReplyWriter) -> None:
        """Change the state, and reply with the new parameters."""
        if self.effect is Effect.UPDATED:
            self._update(writer)
            return
        if self.effect is Effect.ACCUMULATED:
            self._accumulate()
        elif self.changes:
            self._state.before_change(0, self._state.config.layout.size)
            self._state.arrays.clear(ACCUMULATED)
            self._state.arrays.settle()
        if self._step.request.reply_base is None:  # otherwise the client has them
            reply_parameters(self._state.arrays, self._state.config.layout, self._step.request, writer)
            with ReplyPipeline(writer, self._state.arrays.depth) as reply:
                reply_rows(self._state.arrays, self._step.request, self._step.named_rows(), reply)

    def result(self, moment: Moment) -> StepResult:
        """Return the step's result, once the state has counted it."""
        return step_result(self._state, self._check, self.effect, self._measured, moment)

    def _update(self, writer: ReplyWriter) -> None:
        request, arrays = self._step.request, self._state.arrays
        update = Update(arrays, self._segments, len(self._check.groups))
        ranges = reply_ranges(self._state.config.layout, request.reply_first)
        with ReplyPipeline(writer, arrays.depth) as reply:
            for start, end, chunk in self._step.gradient.drain(ranges):
                if chunk is None and not request.reply:
                    continue
                gradient, offset = (None, 0) if chunk is None else (chunk.gradient, chunk.offset)
                for low, high in split_range(start, end, request.reply_elements) if request.reply else [(start, end)]:
                    self._state.before_change(low, high)
                    out = writer.buffer(low, high - low) if request.reply else None
                    before = writer.before() if request.reply and request.reply_base is not None else None
                    asked = [] if before is None else update.read(low, high, low, before)
                    asked += update.apply(gradient, offset, low, high, out)
                    if out is not None:
                        reply.add(asked)
            for table in self._tables:
                update.add(table.gradient.group, table.apply(self._state, request, reply))
        arrays.settle()
        self._measured = update.norms()

    def _accumulate(self) -> None:
        gradient, arrays = self._step.gradient, self._state.arrays
        for start, end, group in gradient.selection.segments:
            factor = gradient_factor(self._check.groups[group], gradient.unscale)
            self._state.before_change(start, end)
            for found in gradient.ranges(start, end):
                arrays.accumulate(found.start, found.chunk.gradient, found.begin, found.end, factor)
        for table in () if gradient.rows is None else gradient.rows.tables():
            factor = gradient_factor(self._check.groups[table.group], gradient.unscale)
            for found in dense_ranges(table, arrays):
                self._state.before_change(found.chunk.offset, found.chunk.end)
                arrays.accumulate(found.start, found.chunk.gradient, found.begin, found.end, factor)
        arrays.settle()
