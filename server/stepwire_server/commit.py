"""What a commit does to the state, once the step has been admitted and everything has arrived.

`Commit` checks everything when it is made, and changes nothing; `apply` then changes the state, range by range, each
range's answer being encoded in the same pass that updates it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from stepwire.layout import Layout
from stepwire.optimizers import Adagrad
from stepwire_server.answer import Answer, ReplySink
from stepwire_server.engines.protocol import PARAM, EngineState, Span
from stepwire_server.order import StepOrder
from stepwire_server.outcome import Outcome, updated
from stepwire_server.plan import SessionPlan
from stepwire_server.progress import Progress
from stepwire_server.staging import GradientStaging
from stepwire_server.stepping import gradient_factor, passes, trusted
from stepwire_server.updating import Update
from stepwire_server.verdict import judge

__all__ = ["Commit", "initialize", "pieces_of", "reply_ranges", "send_parameters"]

_COPY_ELEMENTS = 1 << 20


class Commit:
    """One step on its way into the state.

    Attributes:
        updates: the step changes the state; otherwise it is skipped.
    """

    def __init__(
        self, plan: SessionPlan, order: StepOrder, staging: GradientStaging, state: EngineState, progress: Progress
    ) -> None:
        """Check that the step can be applied, and compute its numbers; nothing is changed.

        Raises:
            InvalidRequestError, NonFiniteGradientError: as `judge`.
        """
        verdict = judge(plan, order, staging, state, progress)
        self._plan, self._order, self._staging, self._state = plan, order, staging, state
        self._groups, self._norms, self._last = verdict.groups, verdict.norms, verdict.last
        skip = order.decision is not None and order.decision.skip
        self.updates = not skip and (verdict.finite or plan.treatment.policy == "allow")
        if self.updates and self._last:
            runs = progress.runs(staging.active)
            self._runs = passes(plan, self._groups, runs, staging.unscale, self._norms.coefficients)
            if plan.rule.direction is not None:
                self._runs = trusted(self._runs, self._groups, staging, state)

    def apply(self, sink: ReplySink) -> Outcome:
        """Change the state, and answer with the new parameters."""
        if not self._last:
            self._accumulate()
            return self.keep(sink)
        order, update = self._order, Update(self._state, self._runs, len(self._groups))
        with Answer(sink, self._state.depth) as answer:
            for start, end, chunk in self._staging.drain(reply_ranges(self._plan.layout, order.reply_first)):
                if chunk is None and not order.reply:
                    continue
                gradient, offset = (None, 0) if chunk is None else (chunk.gradient, chunk.offset)
                for low, high in pieces_of(start, end, order.reply_elements) if order.reply else [(start, end)]:
                    out = sink.buffer(low, high - low) if order.reply else None
                    before = sink.before() if order.reply and order.reply_base is not None else None
                    asked = [] if before is None else update.answer(low, high, low, before)
                    asked += update.step(gradient, offset, low, high, out)
                    if out is not None:
                        answer.add(asked)
        self._state.settle()
        count = self._staging.non_finite_count
        return updated(self._plan, self._groups, self._norms, update.norms(), count)

    def keep(self, sink: ReplySink) -> Outcome:
        """Answer with the parameters as they are."""
        if self._order.reply_base is None:  # otherwise the client has them
            send_parameters(self._state, self._plan.layout, self._order, sink)
        skipped, ones = not self.updates, (1.0,) * len(self._groups)
        norms = self._norms._replace(coefficients=ones, coefficient=1.0, left=self._norms.total)
        clipped = (0.0,) * len(self._groups) if skipped else norms.groups
        total = 0.0 if skipped else norms.total
        count = self._staging.non_finite_count
        return Outcome(False, skipped, self._groups, norms, clipped, total, (), (), count)

    def _accumulate(self) -> None:
        staging = self._staging
        for start, end, group in staging.active.stretches:
            factor = gradient_factor(self._groups[group], staging.unscale)
            for piece in staging.pieces(start, end):
                self._state.accumulate(piece.start, piece.chunk.gradient, piece.begin, piece.end, factor)
        self._state.settle()


def send_parameters(state: EngineState, layout: Layout, order: StepOrder, sink: ReplySink) -> None:
    """Answer with the parameters as they are, if an answer is wanted."""
    if order.reply:
        with Answer(sink, state.depth) as answer:
            for low, high in reply_ranges(layout, order.reply_first):
                for start, end in pieces_of(low, high, order.reply_elements):
                    answer.add([state.read(PARAM, start, sink.buffer(start, end - start))])


def reply_ranges(layout: Layout, first: Sequence[int]) -> list[Span]:
    """Return the space in the order in which it is answered: some tensors by index, then what is left of it."""
    if not first:
        return [(0, layout.size)]
    spans = [(layout.tensors[index].offset, layout.tensors[index].end) for index in first]
    ranges, done = [span for span in spans if span[0] < span[1]], 0
    for start, end in sorted(ranges):
        if done < start:
            ranges.append((done, start))
        done = end
    return ranges if done == layout.size else [*ranges, (done, layout.size)]


def pieces_of(start: int, end: int, most: int) -> list[Span]:
    """Cut `[start, end)` at the multiples of `most`, which blocks of 256 never straddle."""
    if (start // most + 1) * most >= end:
        return [(start, end)] if start < end else []
    cuts = [start, *range((start // most + 1) * most, end, most), end]
    return [(low, high) for low, high in itertools.pairwise(cuts) if low < high]


def initialize(plan: SessionPlan, state: EngineState) -> None:
    """Give slots their first values where these are not zeros."""
    if isinstance(plan.optimizer, Adagrad) and plan.optimizer.initial_accumulator_value:
        values = np.full(min(_COPY_ELEMENTS, plan.layout.size), plan.optimizer.initial_accumulator_value, np.float32)
        for tensor in plan.layout.tensors:
            for low, high in pieces_of(tensor.offset, tensor.end, _COPY_ELEMENTS):
                state.write("sum", low, values[: high - low])
