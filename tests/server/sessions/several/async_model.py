"""Workers without rounds as NumPy has them: each contribution is a step, as it comes. A run of the product beside."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from stepwire.errors import Reason, StepwireError
from stepwire.optimizers.aggregation import Aggregation
from tests.server.sessions.several.model import Operation
from tests.server.sessions.several.rig import Attached, Commit, Rig, Vector

__all__ = ["AsyncRun"]

SIZE = 3


@dataclasses.dataclass
class Worker:
    """A worker as the model has it.

    Attributes:
        attached: its stream; None for none.
        present: a stream is attached.
        base: the step whose parameters it has.
        clock: its contributions since it joined, and the clock of the slowest one that it joined.
        number: its last answered contribution.
        answer: the answer to it: the step, whether it was dropped, and its staleness.
        waiting: the commit that waits, its gradient, and the clock reading of its arrival; None for none.
    """

    attached: Attached | None = None
    present: bool = False
    base: int = 0
    clock: int = 0
    number: int = 0
    answer: tuple[int, bool, int] | None = None
    waiting: tuple[Commit, Vector, float] | None = None


class AsyncRun:
    """One sequence of operations on the product, and on the model."""

    def __init__(self, rig: Rig, aggregation: Aggregation) -> None:
        self.rig, self.aggregation = rig, aggregation
        self.workers = [Worker() for _ in range(aggregation.workers)]
        self.values = np.zeros(SIZE, np.float32)
        self.step_number = 0
        self.draws = np.random.default_rng(11)

    def do(self, operation: Operation) -> None:
        """Carry an operation out on both, and compare."""
        worker = self.workers[operation.worker % len(self.workers)]
        if operation.kind == "pass":
            self.rig.pass_time(operation.seconds)
        else:
            getattr(self, operation.kind)(worker)
        self.settle()
        assert self.rig.parameters[:SIZE].tobytes() == self.values.tobytes()
        members = self.rig.session.ledger.members
        assert [members[index].number for index in range(len(self.workers))] == [each.number for each in self.workers]

    # --- operations ---------------------------------------------------------------------------------------

    def join(self, worker: Worker) -> None:
        """Attach as a new client; a commit of the older one that waits is refused."""
        former, self.attached = worker.attached, None
        self._come(worker, 0, Reason.FENCED)
        worker.base = self.step_number
        if former is not None:
            former.leave()

    def come_back(self, worker: Worker) -> None:
        """Attach with the token of the client."""
        if (former := worker.attached) is not None:
            self._come(worker, former.holder.token, Reason.STREAM_DISPLACED)
            former.leave()

    def _come(self, worker: Worker, token: int, refused: Reason) -> None:
        if not worker.present:
            clocks = [each.clock for each in self.workers if each.present]
            worker.clock = max(worker.clock, min(clocks, default=0))
        worker.present, waiting = True, worker.waiting
        worker.attached, worker.waiting = self.rig.attach(self.workers.index(worker), token), None
        if waiting is not None:
            assert isinstance(waiting[0].outcome, StepwireError)
            assert waiting[0].outcome.reason == refused

    def leave(self, worker: Worker) -> None:
        """Detach; one that waits cannot, since its stream is being served."""
        if worker.attached is not None and worker.present and worker.waiting is None:
            worker.present = False
            self.rig.leave(worker.attached)

    def step(self, worker: Worker) -> None:
        """Contribute the next gradient."""
        if worker.attached is None or not worker.present or worker.waiting is not None:
            return
        gradient = self.draws.standard_normal(SIZE).astype(np.float32)
        fields: dict[str, Any] = {"base_step": worker.base}
        step = self.rig.staged(worker.attached.holder, gradient, worker.number + 1, **fields)
        arrived = self.rig.now
        worker.waiting = self.rig.commit(step), gradient, arrived

    def repeat(self, worker: Worker) -> None:
        """Send the last answered contribution again: its answer comes again."""
        if worker.attached is None or not worker.present or worker.waiting is not None or worker.answer is None:
            return
        commit = self.rig.commit(self.rig.staged(worker.attached.holder, None, worker.number))
        assert answer_of(commit) == worker.answer
        assert commit.values[:SIZE].tobytes() == self.values.tobytes()
        worker.base = self.step_number

    def skip_ahead(self, worker: Worker) -> None:
        """Send a number that is not next, and a gradient of parameters that are not there yet: both are refused."""
        if worker.attached is None or not worker.present:
            return
        for number, base in ((worker.number + 2, 0), (worker.number + 1, self.step_number + 1)):
            try:
                self.rig.staged(worker.attached.holder, None, number, base_step=base).close()
            except StepwireError as error:
                assert error.reason == Reason.STEP_MISMATCH
            else:
                raise AssertionError("it was admitted")

    # --- the model ----------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Have the model answer whoever was answered, in the order of the steps; the others have to wait."""
        found = [worker for worker in self.workers if worker.waiting is not None and worker.waiting[0].outcome]
        for worker in sorted(found, key=_order):
            self._settle(worker)
        for worker in self.workers:
            assert worker.waiting is None or self._is_held_back(worker)

    def _settle(self, worker: Worker) -> None:
        assert worker.waiting is not None
        commit, gradient, arrived = worker.waiting
        staleness = self.step_number - worker.base
        if isinstance(commit.outcome, StepwireError):
            assert commit.outcome.reason == Reason.NOT_ENOUGH_WORKERS
            assert self._is_held_back(worker)
            assert self.rig.now >= arrived + self.aggregation.round_timeout
            worker.waiting = None
        elif self._is_too_old(worker):
            self._answered(worker, commit, dropped=True, staleness=staleness)
        else:
            assert not self._is_held_back(worker)
            factor = np.float32(1.0 / (1.0 + staleness)) if self.aggregation.staleness_correction else np.float32(1.0)
            self.values = (self.values - factor * gradient).astype(np.float32)
            self.step_number += 1
            self._answered(worker, commit, dropped=False, staleness=staleness)

    def _is_too_old(self, worker: Worker) -> bool:
        most = self.aggregation.max_staleness_steps
        return most is not None and self.step_number - worker.base > most

    def _is_held_back(self, worker: Worker) -> bool:
        if self._is_too_old(worker):
            return False
        lead = self.aggregation.max_clock_lead
        clocks = [each.clock for each in self.workers if each.present and each is not worker]
        return lead is not None and worker.clock - min(clocks, default=worker.clock) > lead

    def _answered(self, worker: Worker, commit: Commit, *, dropped: bool, staleness: int) -> None:
        worker.number, worker.clock = worker.number + 1, worker.clock + 1
        worker.answer = self.step_number, dropped, staleness
        assert answer_of(commit) == worker.answer
        assert commit.values[:SIZE].tobytes() == self.values.tobytes()
        worker.base, worker.waiting = self.step_number, None

    def close(self) -> None:
        """End everything."""
        self.rig.close()


def _order(worker: Worker) -> tuple[int, bool]:
    """Order by the step of an answer: what was dropped there came after it."""
    assert worker.waiting is not None
    outcome = worker.waiting[0].outcome
    if isinstance(outcome, StepwireError):
        return 0, False
    assert outcome is not None
    assert outcome.round is not None
    return outcome.step, outcome.round.dropped


def answer_of(commit: Commit) -> tuple[int, bool, int]:
    """Return the step of an answer, whether the gradient was dropped, and its staleness."""
    result = commit.outcome
    assert result is not None
    assert not isinstance(result, StepwireError), result
    assert result.round is not None
    return result.step, result.round.dropped, result.round.staleness
