"""Several workers without rounds: each contribution is a step, as it comes."""

from __future__ import annotations

import math

from stepwire.errors import NotEnoughWorkersError
from stepwire.optimizers.norms import rounded_norm
from stepwire_server.aggregation.uploads import UploadSlot
from stepwire_server.records.round_result import Contributor, RoundResult
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.contributions import Contributions, not_sent
from stepwire_server.sessions.members import Member
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.check_gradient import GradientCheck, check_gradient
from stepwire_server.steps.reply import ReplyWriter
from stepwire_server.steps.step import Step

__all__ = ["AsyncSteps"]


class AsyncSteps(Contributions):
    """The asynchronous steps of one session."""

    def begin(self, request: StepRequest, holder: Holder, began: float, slot: UploadSlot | None) -> Step:
        """See `Contributions.begin`."""
        state = self.parts.state
        with self.parts.lock:
            member = self.member(request, holder)
            needed = self.admit(member, request.step) and not self._is_too_old(self.staleness(request))
            unscale = state.unscale(request)
            entry = self.parts.progress.begin() if needed else None
        reply = request.reply_dtype if request.reply else None
        state.prepare(request.groups, request.gradient_dtype, reply, rows=request.reply_rows)
        room = self.room(request, slot, needed=needed)
        gradient = state.stage_gradient(request, unscale, room)
        step = Step(request, holder, gradient, replay=not needed, began=began, entry=entry)
        step.slot = slot
        return step

    def commit(self, step: Step, writer: ReplyWriter) -> StepResult:
        """See `Contributions.commit`."""
        with self.parts.lock:
            result, mark = self._commit(step, writer), self.parts.progress.last
        self.parts.progress.settle_step(step, mark)
        return result

    def check(self, step: Step) -> GradientCheck | None:
        """See `Contributions.check`."""
        with self.parts.lock:
            member, staleness = self._admitted(step)
            if staleness is None or self._is_too_old(staleness):
                return None
            self._require_gradient(step)
            self._number(step, staleness)
            return check_gradient(step, self.parts.state)

    def loaded(self) -> None:
        """See `Contributions.loaded`: nothing is kept between steps."""

    def _commit(self, step: Step, writer: ReplyWriter) -> StepResult:
        arrived = self.parts.clock()
        while True:
            member, staleness = self._admitted(step)
            if staleness is None:
                return self.replay(member, step, writer)
            if self._is_too_old(staleness):
                member.clock += 1
                return self.drop(member, step, writer, staleness)
            self._require_gradient(step)
            if not self._waits(member, step, arrived):
                break
            self.check_waiting(step)
        self._number(step, staleness)
        step.gradient.complete()
        part = self._part(step, staleness, self.parts.clock() - arrived)
        step.parts = ((member.worker.index, part),)
        result = self.apply(step, writer)
        member.clock += 1
        return result

    def _admitted(self, step: Step) -> tuple[Member, int | None]:
        """Return the worker of a contribution and its staleness; None for a replay."""
        member = self.member(step.request, step.holder)
        following = self.admit(member, step.contribution)
        return member, self.staleness(step.request) if following else None

    def _is_too_old(self, staleness: int) -> bool:
        most = self.aggregation.max_staleness_steps
        return most is not None and staleness > most

    def _require_gradient(self, step: Step) -> None:
        if step.replay:
            raise not_sent(step.contribution)

    def _waits(self, member: Member, step: Step, arrived: float) -> bool:
        """Wait until something changes, if the worker is too far ahead; False if it is not.

        Raises:
            NotEnoughWorkersError: it has waited for long enough.
        """
        lead, members, now = self.aggregation.max_clock_lead, self.parts.ledger.members, self.parts.clock()
        others = [other for other in members if other.is_present(now) and other is not member]
        slowest = min(others, key=lambda other: other.clock, default=member)
        if lead is None or member.clock - slowest.clock <= lead:
            return False
        left = arrived + self.aggregation.round_timeout - now
        if left <= 0.0:
            index = slowest.worker.index
            raise NotEnoughWorkersError(
                f"worker {member.worker.index} is {member.clock - slowest.clock} contributions ahead of {index}, "
                f"which added none within {self.aggregation.round_timeout:g} s; nothing was applied, step again",
                metadata={"missing_workers": index},
            )
        if step.slot is not None:  # the slowest worker needs one
            step.slot.release()
        self.changed.wait(min(left, members.next_absence(now) - now))
        return True

    def _number(self, step: Step, staleness: int) -> None:
        """Give a contribution the number of the next step, and its share of the learning rate."""
        step.request = step.request.numbered(self.parts.ledger.applied_step + 1)
        if self.aggregation.staleness_correction:
            step.request = step.request._replace(lr_factor=1.0 / (1.0 + staleness))

    def _part(self, step: Step, staleness: int, waited: float) -> RoundResult:
        gradient, every = step.gradient, range(len(self.parts.config.groups))
        norm = rounded_norm(math.fsum(gradient.squared_norms()), lambda: gradient.exact_squared_norm(every))
        contributor = Contributor(step.holder.worker, 1.0, norm, gradient.non_finite_count)
        members = len(self.parts.ledger.members.attached)
        return RoundResult(step.contribution, False, members, (contributor,), waited, staleness)
