"""Rounds of several workers: their gradients become one, which is one step.

A gradient is staged as it arrives, and added to the reduction at its commit, in one pass. So a stream that breaks off
poisons no round. Every worker waits for the end of its round in its own thread. The thread that finds the round at its
end applies the step, and encodes the parameters once for all.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from stepwire.errors import StateChangedError, StepwireError, UnavailableError
from stepwire.optimizers.norms import rounded_norm
from stepwire.wire.dtypes import FLOAT32
from stepwire_server.aggregation.grace import Grace
from stepwire_server.aggregation.reduction import Reduction
from stepwire_server.aggregation.round import Contribution, Round
from stepwire_server.aggregation.row_sum import ReducedRows
from stepwire_server.aggregation.uploads import UploadSlot
from stepwire_server.devices.budget import Reservation
from stepwire_server.engines.protocol import EngineState, HostArray
from stepwire_server.records.round_result import Contributor, RoundResult
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.contributions import Contributions, Parts, again, not_sent
from stepwire_server.sessions.freeze import Freeze
from stepwire_server.sessions.members import Member
from stepwire_server.sessions.progress import Mark
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.check_gradient import GradientCheck, check_gradient, refusal
from stepwire_server.steps.gradient import StagedGradient
from stepwire_server.steps.reply import ReplyWriter, SharedReplyWriter, split_range
from stepwire_server.steps.row_gradients import row_gradients
from stepwire_server.steps.step import Step

__all__ = ["Rounds"]

_ROUNDS_KNOWN: Final = 64
_CHUNK_ELEMENTS: Final = 4 << 20
"""The chunk of a reduced gradient for a GPU, which squares one chunk during the copy of the next."""


class Rounds(Contributions):
    """The rounds of one session, one at a time."""

    def __init__(self, parts: Parts, staging: EngineState, reduction: Reduction, room: Reservation) -> None:
        """Use the parts of a session.

        Args:
            parts: the parts.
            staging: receives gradients on the host.
            reduction: makes one of several; closed with the session.
            room: the memory of the reduction; released with the session.
        """
        super().__init__(parts)
        aggregation = self.aggregation
        self._staging = staging
        self._reduction = reduction
        self._room = room
        self._beyond: list[Reservation] = []
        self._round: Round | None = None
        self._grace = Grace(aggregation.workers, aggregation.least_grace, aggregation.most_grace)
        self._opened: dict[int, float] = {}  # by step, of the last rounds

    def begin(self, request: StepRequest, holder: Holder, began: float, slot: UploadSlot | None) -> Step:
        """See `Contributions.begin`."""
        state, config = self.parts.state, self.parts.config
        with self.parts.lock:
            needed = self._needs_gradient(request, holder)
            unscale = state.unscale(request)
        state.prepare(request.groups, FLOAT32, request.reply_dtype if request.reply else None, rows=False)
        with contextlib.ExitStack() as undo:
            room = self.room(request, slot, needed=needed)
            undo.callback(room.release)
            selection, sums = config.without(request.missing), config.squares or self.aggregation.is_robust
            gradient = StagedGradient(
                request.gradient_dtype, selection, self._staging, room, unscale=unscale, sums=sums
            )
            gradient.rows = row_gradients(request, selection, self._staging, keeps_entries=True)
            undo.pop_all()
        return Step(request, holder, gradient, replay=not needed, began=began)

    def commit(self, step: Step, writer: ReplyWriter) -> StepResult:
        """See `Contributions.commit`."""
        with self.parts.lock:
            result, mark = self._commit(step, writer)
        self.parts.progress.settle_step(step, mark)
        return result

    def check(self, step: Step) -> GradientCheck | None:
        """See `Contributions.check`."""
        with self.parts.lock:
            if not self._awaits_step(step):
                return None
            round_ = self._contributed(step)
            while round_.check is None and not round_.is_over:
                self._advance(round_, step)
            if round_.failure is not None:
                raise again(round_.failure)
            return round_.check

    def loaded(self) -> None:
        """See `Contributions.loaded`."""
        if self._round is not None:
            changed = "a load has replaced the parameters of the round; pull them and compute the gradient again"
            self._fail(self._round, StateChangedError(changed))

    def rest(self, freeze: Freeze) -> None:
        """See `Contributions.rest`: an open round with such a contribution ends, and its workers send theirs again."""
        try:
            for each in self._round or ():
                freeze.check_contribution(each.part.worker, each.request.step)
        except UnavailableError as error:
            assert self._round is not None
            self._fail(self._round, error)
        super().rest(freeze)

    def close(self) -> None:
        """See `Contributions.close`."""
        super().close()
        try:
            self._reduction.close()
        finally:
            for reservation in (self._room, *self._beyond):
                reservation.release()

    # --- one contribution --------------------------------------------------------------------------------

    def admit(self, member: Member, number: int) -> bool:
        """See `Contributions.admit`; while the open round has a contribution of the worker, no other one follows."""
        following, round_ = super().admit(member, number), self._present()
        if following and round_ is not None and (given := round_.of(member.worker.index)) is not None:
            given.check_number(number)
        return following

    def _needs_gradient(self, request: StepRequest, holder: Holder) -> bool:
        """Tell whether a contribution is a new one, and in time."""
        member = self.member(request, holder)
        if not self.admit(member, request.step) or self.staleness(request):
            return False
        round_ = self._present()
        return round_ is None or round_.of(holder.worker) is None

    def _present(self) -> Round | None:
        """Return the open round; one that had too few for too long, while nobody looked, has failed."""
        round_ = self._round
        if round_ is not None and not round_.has_enough and self._ends_at(round_) <= self.parts.clock():
            self._fail(round_, round_.too_few())
        return self._round

    def _awaits_step(self, step: Step) -> bool:
        """Tell whether a contribution is a part of a round that is not over, or may become one."""
        member = self.member(step.request, step.holder)
        return self.admit(member, step.contribution) and not self.staleness(step.request)

    def _commit(self, step: Step, writer: ReplyWriter) -> tuple[StepResult, Mark]:
        member, last = self.member(step.request, step.holder), self.parts.progress.last
        if not self.admit(member, step.contribution):
            return self.replay(member, step, writer), last
        if staleness := self.staleness(step.request):
            self._arrived_late(step.request)
            return self.drop(member, step, writer, staleness), self.parts.progress.last
        round_ = self._contributed(step)
        contribution = round_.of(step.holder.worker)
        assert contribution is not None
        contribution.asked, contribution.writer, contribution.rows = step.request, writer, step.named_rows()
        while not round_.is_over:
            self._advance(round_, step, decided=step.decision is not None)
        if round_.failure is not None:
            raise again(round_.failure)
        assert round_.result is not None
        result = member.result
        assert result is not None
        member.told = True
        return result, self.parts.progress.last

    def _contributed(self, step: Step) -> Round:
        """Return the open round, once the contribution is in it.

        Raises:
            StepwireError: the contribution is refused; the round is as before.
        """
        round_ = self._present()
        if round_ is not None and (contribution := round_.of(step.holder.worker)) is not None:
            contribution.replaced = step.holder.acquired != contribution.holder.acquired
            _let_go(step)
            return round_
        if step.replay:
            raise not_sent(step.contribution)
        if round_ is not None and round_.step is not None:  # its gradients are reduced by now
            raise StateChangedError("the round is being decided without this worker; step again")
        return self._add(step)

    def _add(self, step: Step) -> Round:
        gradient, request, parts = step.gradient, step.request, self.parts
        parts.progress.check()
        gradient.complete()
        if gradient.non_finite_count and parts.config.treatment.policy == "reject":
            raise refusal(step, parts.config.layout, gradient)
        every = range(len(parts.config.groups))
        norm = rounded_norm(math.fsum(gradient.squared_norms()), lambda: gradient.exact_squared_norm(every))
        now = parts.clock()
        if (round_ := self._round) is None:
            round_ = self._round = Round(self.aggregation, now)
            self._opened[parts.ledger.applied_step + 1] = now
            if len(self._opened) > _ROUNDS_KNOWN:
                del self._opened[next(iter(self._opened))]
        else:
            self._grace.arrived(now - round_.opened)
        part = Contributor(step.holder.worker, request.weight, norm, gradient.non_finite_count)
        self._reduce_with(round_, gradient, request.weight * gradient.unscale)
        round_.add(Contribution(request, step.holder, part, now, asked=request))
        _let_go(step)
        self.wake()
        return round_

    def _reduce_with(self, round_: Round, gradient: StagedGradient, factor: float) -> None:
        """Add a gradient to the reduction. If that fails a part of it is in there, so the round fails too.

        Raises:
            ResourceExhaustedError: rows, or the rounding errors of the sum, take more memory than there is.
        """
        began = self.parts.clock()
        try:
            self._reduction.add(gradient, factor)
            round_.reduce_seconds += self.parts.clock() - began
            if (beyond := self._reduction.nbytes - self._room.nbytes - sum(each.nbytes for each in self._beyond)) > 0:
                budget = self.parts.state.device.budget
                self._beyond.append(budget.reserve(beyond, "the rows of the workers' gradients, and rounding errors"))
        except BaseException as error:
            failed = error if isinstance(error, StepwireError) else StateChangedError("the round failed; step again")
            self._fail(round_, failed)
            raise

    def _clear(self) -> None:
        """Begin the next round, and give back what rows and rounding errors took."""
        self._reduction.clear()
        while self._beyond:
            self._beyond.pop().release()

    def _arrived_late(self, request: StepRequest) -> None:
        opened = None if request.base_step is None else self._opened.get(request.base_step + 1)
        if opened is not None:
            self._grace.arrived(self.parts.clock() - opened)

    # --- the round ---------------------------------------------------------------------------------------

    def _ends_at(self, round_: Round) -> float:
        return round_.ends_at(self.parts.ledger.members.present(self.parts.clock()), self._grace)

    def _advance(self, round_: Round, step: Step, *, decided: bool = False) -> None:
        """Go on with a round, or wait until something changes.

        Raises:
            StepwireError: this worker waits no longer; the round may go on.
        """
        two_phase = self.parts.config.treatment.two_phase
        if round_.step is not None and decided:
            round_.step.decision = step.decision
            self._apply(round_)
            return
        self.check_waiting(step)
        if round_.step is not None:  # somebody decides
            self.changed.wait()
            return
        now = self.parts.clock()
        left = self._ends_at(round_) - now
        if left > 0.0:
            self.changed.wait(min(left, self.parts.ledger.members.next_absence(now) - now))
        elif not round_.has_enough:
            self._fail(round_, round_.too_few())
        else:
            self._reduce(round_)
            if not two_phase:
                self._apply(round_)

    def _fail(self, round_: Round, error: StepwireError) -> None:
        """End a round without a step."""
        round_.failure, self._round = error, None
        if round_.step is not None:
            round_.step.close()
        self._clear()
        self.wake()

    def _reduce(self, round_: Round) -> None:
        """Make the step of a round; with two phases, check it."""
        parts, lead = self.parts, round_.lead
        request = lead.request._replace(
            step=parts.ledger.applied_step + 1,
            gradient_dtype=FLOAT32,
            missing=round_.missing_tensors(),
            loss_scale=1.0,
            reply_base=None,
        )
        try:
            began = parts.clock()
            divisor = round_.divisor()
            reduced, rows = self._reduction.reduced(divisor), self._reduction.reduced_rows(divisor)
            round_.reduce_seconds += parts.clock() - began
            request = request._replace(tables=tuple((table.tensor, len(table.rows)) for table in rows))
            round_.step = step = self.begin_again(request, lead.holder, self._told(round_), reduced=True)
            self._stage(step, reduced, rows)
            step.began, step.received, step.reduce_seconds = round_.opened, parts.clock(), round_.reduce_seconds
            if parts.config.treatment.two_phase:
                round_.check = check_gradient(step, parts.state)
        except StepwireError as error:
            self._fail(round_, error)
        self.wake()

    def _stage(self, step: Step, reduced: HostArray, rows: Sequence[ReducedRows]) -> None:
        if step.entry is not None:  # the log reads it while the next round is added up
            reduced = reduced.copy()
        layout, at_once, place = self.parts.config.layout, self.parts.state.arrays.depth == 1, 0
        for start, end in layout.dense_ranges:
            first = start + -start % layout.chunk_alignment  # behind the padding of a table
            for low, high in split_range(first, end, end if at_once else _CHUNK_ELEMENTS):
                values = reduced[low - start + place : high - start + place]
                step.add(low, high - low, values.view(np.uint8))
            place += end - start
        for table in rows:
            if len(table.rows):
                values = table.values.reshape(-1)
                step.add_rows(table.offset, len(values), table.rows.astype(np.uint64), values.view(np.uint8))

    def _told(self, round_: Round) -> Sequence[tuple[int, RoundResult]]:
        """Return what each contributor is told; the lead comes first."""
        now, members = self.parts.clock(), len(self.parts.ledger.members.attached)
        contributors = tuple(contribution.part for contribution in round_)
        return tuple(
            (each.part.worker, RoundResult(each.request.step, each.replaced, members, contributors, now - each.arrived))
            for each in round_
        )

    def _apply(self, round_: Round) -> None:
        """Apply the step of a round, and reply to all who wait for it."""
        if (step := round_.step) is None:  # it could not be made
            return
        writers = _grouped([each for each in round_ if each.writer is not None])
        (request, first), *others = writers
        step.parts = self._told(round_)
        step.request = step.request._replace(
            reply=request.reply,
            reply_dtype=request.reply_dtype,
            reply_elements=request.reply_elements,
            reply_first=request.reply_first,
            reply_rows=False,  # each worker gets those that it named
        )
        try:
            with step:
                result = self.apply(step, first)
        except StepwireError as error:
            round_.step = None
            self._fail(round_, error)
            return
        for request, writer in others:
            self.parts.commits.reply(request, writer)
        for each in round_:
            if each.rows and isinstance(each.writer, SharedReplyWriter):
                self.parts.commits.reply_rows(each.asked, each.writer.alone(), each.rows)
        self._clear()
        self.parts.ledger.members.await_no_longer([each.part.worker for each in round_])
        round_.result, self._round = result, None
        self.wake()


def _grouped(waiting: Sequence[Contribution]) -> list[tuple[StepRequest, ReplyWriter]]:
    """Return one writer for each form of reply; those of the same form follow it."""
    leaders: dict[object, tuple[StepRequest, ReplyWriter]] = {}
    for each in waiting:
        writer = each.writer
        assert writer is not None
        key = writer.form if isinstance(writer, SharedReplyWriter) else id(writer)
        if key not in leaders:
            leaders[key] = (each.asked._replace(reply_base=None), writer)
        elif isinstance(writer, SharedReplyWriter):
            writer.follow(leaders[key][1])
    return list(leaders.values())


def _let_go(step: Step) -> None:
    """Let go of a gradient that is in the round, and of its place among the uploads, which others need.

    The rows that it names are remembered: they go back.
    """
    step.named_rows()
    step.gradient.close()
    step.replay = True
