"""What a commit does to the state, once the step has been admitted and everything has arrived.

`Commit` checks everything when it is made, and changes nothing; `apply` then changes the state, range by range, each
range's answer being encoded in the same pass that updates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from stepwire.errors import NonFiniteGradientError
from stepwire.optimizers import Adagrad, Hyperparameters
from stepwire_server.answer import Answer, ReplySink
from stepwire_server.engines.protocol import PARAM, EngineState, HostArray, Pending
from stepwire_server.exact_norm import exact_sum_of_squares
from stepwire_server.norms import GradientNorms, gradient_norms
from stepwire_server.plan import SessionPlan, StepOrder
from stepwire_server.progress import GroupRecord, Progress, StepRecord
from stepwire_server.staging import GradientStaging, StagedChunk
from stepwire_server.stepping import (
    between,
    effective_groups,
    gradient_factor,
    passes,
    trusted,
)

__all__ = ["Commit", "Outcome", "initialize", "pieces_of", "send_parameters"]

_COPY_ELEMENTS = 1 << 20


ExactSquare = Callable[[Sequence[int]], Fraction]
Sums = list[list[Pending[tuple[float, ...]]]]


class Outcome(NamedTuple):
    """What a commit did.

    Attributes:
        updated: the parameters were stepped.
        skipped: nothing changed because the gradient was not finite.
        groups: the numbers of each group.
        norms: of the gradient, with the factors of clipping.
        clipped: norm of each group's gradient after all clipping.
        clipped_total: of the whole gradient after all clipping.
        update_norms: of each group's change; empty where it was not measured.
        param_norms: of each group's new parameters; empty likewise.
        non_finite_count: gradient elements that were NaN or Inf.
    """

    updated: bool
    skipped: bool
    groups: tuple[Hyperparameters, ...]
    norms: GradientNorms
    clipped: tuple[float, ...]
    clipped_total: float
    update_norms: tuple[float, ...]
    param_norms: tuple[float, ...]
    non_finite_count: int

    def record(
        self, step: int, epoch: int, t: list[int], times: tuple[float, float, float], loss_scale: float | None
    ) -> StepRecord:
        """Return the record of the step, given what the session knows."""
        measured = bool(self.update_norms)
        groups = tuple(
            GroupRecord(
                grad_norm=self.norms.groups[index],
                hyperparameters=hyper,
                t=t[index],
                clipped_grad_norm=self.clipped[index],
                clip_coefficient=self.norms.coefficients[index],
                update_norm=self.update_norms[index] if measured else None,
                param_norm=self.param_norms[index] if measured else None,
            )
            for index, hyper in enumerate(self.groups)
        )
        return StepRecord(
            step=step,
            epoch=epoch,
            skipped=self.skipped,
            grad_norm=self.norms.total,
            non_finite_count=self.non_finite_count,
            groups=groups,
            receive_seconds=times[0],
            queue_seconds=times[1],
            apply_seconds=times[2],
            accumulated=not (self.updated or self.skipped),
            clipped_grad_norm=self.clipped_total,
            clip_coefficient=self.norms.coefficient,
            update_norm=_together(self.update_norms) if measured else None,
            param_norm=_together(self.param_norms) if measured else None,
            loss_scale=loss_scale,
        )


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
            InvalidRequestError: the chunks do not cover what they must, or a scheduled number is out of range.
            NonFiniteGradientError: under the policy `reject`.
        """
        staging.complete()
        self._plan, self._order, self._staging, self._state = plan, order, staging, state
        self._groups = effective_groups(plan, order, progress.group_steps())
        every = plan.treatment.accumulation_steps
        self._adds_up = every > 1
        self._last = order.step % every == 0
        self._norms = self._gradient_norms(staging.squared_norms(), staging.exact_squared_norm)
        finite = not staging.non_finite_count
        if self._adds_up and self._last and finite:
            self._norms = self._gradient_norms(self._accumulated_squares(), self._exact_accumulated_square)
            finite = math.isfinite(self._norms.total)
        if not finite and plan.treatment.policy == "reject":
            raise self._refusal()
        self.updates = finite or plan.treatment.policy == "allow"
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
        sums: Sums = [[] for _ in self._groups]
        with Answer(sink, self._state.depth) as answer:
            for start, end, chunk in self._staging.drain():
                if chunk is None and not self._order.reply:
                    continue
                most = self._order.reply_elements if self._order.reply else end - start
                for low, high in pieces_of(start, end, most):
                    out = sink.buffer(low, high - low) if self._order.reply else None
                    work = self._update(chunk, low, high, out, sums)
                    if out is not None:
                        answer.add(work)
        self._state.settle()
        return self._outcome(sums)

    def keep(self, sink: ReplySink) -> Outcome:
        """Answer with the parameters as they are."""
        send_parameters(self._state, self._plan.layout.size, self._order, sink)
        skipped, ones = not self.updates, (1.0,) * len(self._groups)
        norms = self._norms._replace(coefficients=ones, coefficient=1.0, left=self._norms.total)
        clipped = (0.0,) * len(self._groups) if skipped else norms.groups
        total = 0.0 if skipped else norms.total
        count = self._staging.non_finite_count
        return Outcome(False, skipped, self._groups, norms, clipped, total, (), (), count)

    def _update(
        self,
        chunk: StagedChunk | None,
        start: int,
        end: int,
        out: HostArray | None,
        sums: Sums,
    ) -> list[Pending[Any]]:
        """Update flat elements `[start, end)`; what no run covers is answered as it is."""
        done, work = start, list[Pending[Any]]()
        for run in between(self._runs, start, end) if chunk is not None else ():
            assert chunk is not None
            low, high = max(run.start, start), min(run.end, end)
            work += self._answer(done, low, start, out)
            target = None if out is None else out[low - start : high - start]
            moved = self._state.update(run.step, low, chunk.gradient, low - chunk.offset, high - chunk.offset, target)
            sums[run.group].append(moved)
            work.append(moved)
            done = high
        return work + self._answer(done, end, start, out)

    def _answer(self, low: int, high: int, start: int, out: HostArray | None) -> list[Pending[Any]]:
        if out is None or low == high:
            return []
        return [self._state.read(PARAM, low, out[low - start : high - start])]

    def _accumulate(self) -> None:
        staging = self._staging
        for start, end, group in staging.active.stretches:
            factor = gradient_factor(self._groups[group], staging.unscale)
            for piece in staging.pieces(start, end):
                self._state.accumulate(piece.start, piece.chunk.gradient, piece.begin, piece.end, factor)
        self._state.settle()

    def _gradient_norms(self, squared: list[float], exact: ExactSquare) -> GradientNorms:
        treatment = self._plan.treatment
        return gradient_norms(
            squared, exact, treatment.clip_grad_norm, self._plan.group_clips, treatment.clip_formula or "torch"
        )

    def _accumulated_squares(self) -> list[float]:
        staging = self._staging
        totals: list[list[Pending[float]]] = [[] for _ in self._groups]
        for start, end, group in staging.active.stretches:
            factor = gradient_factor(self._groups[group], staging.unscale)
            totals[group] += [
                self._state.sum_of_squares(piece.chunk.gradient, piece.begin, piece.end, factor, piece.start)
                for piece in staging.pieces(start, end)
            ]
        return [math.fsum(asked.wait() for asked in sums) for sums in totals]

    def _exact_accumulated_square(self, groups: Sequence[int]) -> Fraction:
        staging = self._staging
        return exact_sum_of_squares(
            self._state.fetch(
                piece.chunk.gradient,
                piece.begin,
                piece.end,
                gradient_factor(self._groups[group], staging.unscale),
                piece.start,
            )
            for start, end, group in staging.active.stretches
            if group in groups
            for piece in staging.pieces(start, end)
        )

    def _outcome(self, sums: Sums) -> Outcome:
        clipped, total = self._norms.clipped(), self._norms.left * self._norms.coefficient
        moved = [[asked.wait() for asked in group] for group in sums]
        columns = [[math.sqrt(math.fsum(column)) for column in zip(*group, strict=True)] for group in moved]
        if self._plan.treatment.clip_grad_value is not None:
            clipped = tuple(column[2] if column else 0.0 for column in columns)
            total = _together(clipped)
        updates = tuple(column[0] if column else 0.0 for column in columns)
        params = tuple(column[1] if column else 0.0 for column in columns)
        if not self._plan.measures:
            updates = params = ()
        count = self._staging.non_finite_count
        return Outcome(True, False, self._groups, self._norms, clipped, total, updates, params, count)

    def _refusal(self) -> NonFiniteGradientError:
        staging, layout = self._staging, self._plan.layout
        if not staging.non_finite_count:
            return NonFiniteGradientError(
                f"step {self._order.step}: the sum of the accumulated gradients is beyond float32; nothing was "
                "applied. Scale the gradients down, or load a grad_accumulation of zeros"
            )
        tensor = next(layout.overlapping(staging.first_non_finite, staging.first_non_finite + 1))
        return NonFiniteGradientError(
            f"step {self._order.step}: the gradient of tensor {tensor.spec.name!r} holds NaN or Inf "
            f"({staging.non_finite_count} elements in all); nothing was applied. Mend the gradient, or create the "
            "session with the policy 'skip' or 'allow'",
            metadata={
                "tensor": tensor.spec.name,
                "element": staging.first_non_finite - tensor.offset,
                "non_finite_count": staging.non_finite_count,
            },
        )


def send_parameters(state: EngineState, size: int, order: StepOrder, sink: ReplySink) -> None:
    """Answer with the parameters as they are, if an answer is wanted."""
    if order.reply:
        with Answer(sink, state.depth) as answer:
            for start, end in pieces_of(0, size, order.reply_elements):
                answer.add([state.read(PARAM, start, sink.buffer(start, end - start))])


def pieces_of(start: int, end: int, most: int) -> list[tuple[int, int]]:
    """Cut `[start, end)` into pieces of at most `most` elements."""
    return [(low, min(low + most, end)) for low in range(start, end, most)]


def initialize(plan: SessionPlan, state: EngineState) -> None:
    """Give slots their first values where these are not zeros."""
    if isinstance(plan.optimizer, Adagrad) and plan.optimizer.initial_accumulator_value:
        values = np.full(min(_COPY_ELEMENTS, plan.layout.size), plan.optimizer.initial_accumulator_value, np.float32)
        for tensor in plan.layout.tensors:
            for low, high in pieces_of(tensor.offset, tensor.end, _COPY_ELEMENTS):
                state.write("sum", low, values[: high - low])


def _together(norms: tuple[float, ...]) -> float:
    return norms[0] if len(norms) == 1 else math.hypot(*norms)
