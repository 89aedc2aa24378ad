"""Several workers of one session as NumPy and exact fractions have it, and a run of the product beside it.

The model knows the promises alone: a contribution counts at its commit, once; a round is one step of the exact mean;
whoever comes late is answered; each worker has its own last answer.
"""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction

import numpy as np

from stepwire.errors import Reason, StepwireError
from stepwire.optimizers.aggregation import Aggregation
from stepwire_server.records.step_result import StepResult
from tests.server.sessions.several.rig import Attached, Commit, Rig, Vector

__all__ = ["Answer", "Model", "Operation", "Run", "reduced"]

SIZE = 3


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a worker."""

    kind: str
    worker: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a contribution, or the reason of its refusal."""

    step: int = 0
    contribution: int = 0
    dropped: bool = False
    contributors: tuple[tuple[int, float], ...] = ()
    staleness: int = 0
    refused: str = ""


@dataclasses.dataclass
class Given:
    """A contribution in an open round."""

    gradient: Vector
    weight: float
    number: int
    client: int
    replaced: bool = False


def nearest(value: Fraction) -> np.float32:
    """Return the float32 next to a fraction, of two equally near ones the even one."""
    best = np.float32(float(value))
    near = {best, np.nextafter(best, np.float32(np.inf)), np.nextafter(best, np.float32(-np.inf))}
    return min(near, key=lambda each: (abs(Fraction(float(each)) - value), int(each.view(np.uint32)) & 1))


def reduced(aggregation: Aggregation, given: list[Given]) -> Vector:
    """Reduce gradients as the contract says."""
    columns = np.stack([each.gradient for each in given]).T
    if aggregation.reduction == "median":
        return np.median(columns.astype(np.float64), axis=1).astype(np.float32)
    if aggregation.reduction == "trimmed_mean":
        trimmed = min(aggregation.trimmed or 0, (len(given) - 1) // 2)
        kept = [sorted(column)[trimmed : len(given) - trimmed] for column in columns.tolist()]
        return np.array([nearest(sum(map(Fraction, each), Fraction(0)) / len(each)) for each in kept], np.float32)
    weights = [Fraction(each.weight) for each in given]
    divisor = {"mean": Fraction(len(given)), "sum": Fraction(1), "weighted_mean": sum(weights, Fraction(0))}
    totals = [sum(map(lambda v, w: Fraction(v) * w, column, weights), Fraction(0)) for column in columns.tolist()]
    return np.array([nearest(total / divisor[aggregation.reduction]) for total in totals], np.float32)


class Model:
    """The session as the contract has it.

    Attributes:
        values: the parameters.
        step: the number of the last step.
        answers: the last answer of each worker.
        numbers: the last answered contribution of each worker.
        present: the workers that are attached.
        anew: the workers that have contributed nothing since the last load.
    """

    def __init__(self, aggregation: Aggregation) -> None:
        self.aggregation = aggregation
        self.values = np.zeros(SIZE, np.float32)
        self.step = self.load = 0
        self.numbers = dict.fromkeys(range(aggregation.workers), 0)
        self.answers: dict[int, Answer] = {}
        self.present: set[int] = set()
        self.anew: set[int] = set()
        self.round: dict[int, Given] = {}
        self.opened = 0.0
        self.starts: dict[int, float] = {}
        self.arrivals: list[float] = []

    def apply(self, gradient: Vector) -> None:
        """Take a step of plain gradient descent."""
        self.values = self.values - gradient
        self.step += 1

    # --- rounds -------------------------------------------------------------------------------------------

    @property
    def grace(self) -> float:
        """The grace of a round, from the arrivals so far."""
        together, most = self.aggregation, max(self.aggregation.workers - 1, 1)
        known = self.arrivals[-16 * most :]
        if len(known) < most:
            return together.most_grace
        median = float(np.median(known))
        learnt = median + 3.0 * float(np.median(np.abs(np.array(known) - median)))
        return min(max(learnt, together.least_grace), together.most_grace)

    def has_failed(self, now: float) -> bool:
        """Tell whether the open round has had too few workers for too long."""
        few = len(self.round) < self.aggregation.required
        return bool(self.round) and few and now >= self.opened + self.aggregation.round_timeout

    def is_complete(self, now: float) -> bool:
        """Tell whether the open round is at its end, once somebody looks."""
        if len(self.round) < self.aggregation.required:
            return False
        everybody = len(self.round) == self.aggregation.workers or self.present <= set(self.round)
        return everybody or now >= self.opened + self.grace

    def contribute(self, worker: int, given: Given, now: float) -> None:
        """Count a contribution."""
        if self.has_failed(now):
            self.round = {}
        if worker in self.round:
            self.round[worker].replaced = self.round[worker].client != given.client
            return
        if self.round:
            self.arrivals.append(now - self.opened)
        else:
            self.opened = self.starts[self.step + 1] = now
        self.round[worker] = given

    def end_round(self) -> None:
        """Apply the step of the open round, and answer all that are in it."""
        self.apply(reduced(self.aggregation, [self.round[worker] for worker in sorted(self.round)]))
        contributors = tuple((worker, self.round[worker].weight) for worker in sorted(self.round))
        self.anew -= set(self.round)
        for worker, given in self.round.items():
            self.numbers[worker] = given.number
            self.answers[worker] = Answer(self.step, given.number, given.replaced, contributors)
        self.round = {}

    # --- late ones ----------------------------------------------------------------------------------------

    def drop(self, worker: int, number: int, staleness: int) -> None:
        """Answer a contribution that came too late."""
        self.anew.discard(worker)
        self.numbers[worker] = number
        self.answers[worker] = Answer(self.step, number, dropped=True, staleness=staleness)


def told(outcome: StepResult | StepwireError | None) -> Answer | None:
    """Return what the product told; None for nothing yet."""
    if outcome is None:
        return None
    if isinstance(outcome, StepwireError):
        return Answer(refused=str(outcome.reason))
    part = outcome.round
    assert part is not None
    contributors = tuple((each.worker, each.weight) for each in part.contributors)
    return Answer(outcome.step, part.contribution, part.dropped, contributors, part.staleness)


@dataclasses.dataclass
class Worker:
    """A worker's client as the run has it.

    Attributes:
        attached: its stream; None for none.
        base: the step whose parameters it has.
        client: the number of clients before the present one.
        pending: its contribution that was not answered.
        waiting: the commits that wait, each with the stream that it came over.
    """

    attached: Attached | None = None
    base: int = 0
    client: int = 0
    pending: Given | None = None
    waiting: list[tuple[Attached, Commit, int]] = dataclasses.field(default_factory=list)


class Run:
    """One sequence of operations on the product, and on the model."""

    def __init__(self, rig: Rig, model: Model) -> None:
        self.rig, self.model = rig, model
        self.workers = [Worker() for _ in range(model.aggregation.workers)]
        self.draws = np.random.default_rng(7)
        self.loads = itertools.count(1)

    def do(self, operation: Operation) -> None:
        """Carry an operation out on both, and compare."""
        worker = operation.worker % len(self.workers)
        if operation.kind == "pass":
            self.rig.pass_time(operation.seconds)
            self.settle()
        else:
            getattr(self, operation.kind)(worker)
        self.compare()

    # --- operations ---------------------------------------------------------------------------------------

    def join(self, index: int) -> None:
        """Attach as a new client: an older one is fenced."""
        self._attach(index, 0, Reason.FENCED)
        self.workers[index].base, self.workers[index].pending = self.model.step, None
        self.workers[index].client += 1

    def come_back(self, index: int) -> None:
        """Attach with the token of the client."""
        if (attached := self.workers[index].attached) is not None:
            self._attach(index, attached.holder.token, Reason.STREAM_DISPLACED)

    def _attach(self, index: int, token: int, refused: Reason) -> None:
        worker = self.workers[index]
        self.model.present.add(index)
        made = self.rig.attach(index, token)
        for attached, commit, _ in worker.waiting:  # over older streams: they are told, and their round goes on
            assert told(commit.outcome) == Answer(refused=str(refused))
            attached.leave()
        former, worker.waiting, worker.attached = worker.attached, [], made
        if former is not None:
            former.leave()
        self.settle()

    def leave(self, index: int) -> None:
        """Detach; one that waits cannot, since its stream is being served."""
        worker = self.workers[index]
        if worker.attached is None or worker.waiting or index not in self.model.present:
            return
        self.model.present.discard(index)
        self.rig.leave(worker.attached)
        self.settle()

    def step(self, index: int) -> None:
        """Contribute the next gradient, or the one again that was not answered."""
        self._contribute(index)

    def break_off(self, index: int) -> None:
        """Bring a gradient, and break off before its commit."""
        worker = self.workers[index]
        if self._can_step(index):
            assert worker.attached is not None
            given = worker.pending or self._next(index)
            self.rig.staged(worker.attached.holder, given.gradient, given.number, base_step=worker.base).close()

    def poison(self, index: int) -> None:
        """Contribute a NaN: its worker alone is refused."""
        worker = self.workers[index]
        if not self._can_step(index) or index in self.model.round or worker.base < self.model.step:
            return
        assert worker.attached is not None
        gradient = np.array([0.5, np.nan, 1.0], np.float32)
        step = self.rig.staged(worker.attached.holder, gradient, self.model.numbers[index] + 1, base_step=worker.base)
        if self.model.has_failed(self.rig.now):
            self.model.round = {}
        assert told(self.rig.commit(step).outcome) == Answer(refused=str(Reason.NON_FINITE_GRADIENT))
        self.settle()

    def repeat(self, index: int) -> None:
        """Send the last answered contribution again: its answer comes again, with the present parameters."""
        worker, answer = self.workers[index], self.model.answers.get(index)
        if not self._can_step(index) or answer is None:
            return
        assert worker.attached is not None
        commit = self.rig.commit(self.rig.staged(worker.attached.holder, None, answer.contribution))
        assert told(commit.outcome) == answer
        self._received(index, commit)

    def skip_ahead(self, index: int) -> None:
        """Send a number that is not next, and a gradient of parameters that are not there yet: both are refused.

        Behind a load any later number is the next one, unless the open round has one of the worker.
        """
        worker = self.workers[index]
        attached = worker.attached
        if attached is None or not self._can_step(index):
            return
        if self.model.has_failed(self.rig.now):
            self.model.round = {}
        skips = index in self.model.anew and index not in self.model.round
        for number, base in ((2, self.model.step), (1, self.model.step + 1))[skips:]:
            try:
                self.rig.staged(attached.holder, None, self.model.numbers[index] + number, base_step=base).close()
            except StepwireError as error:
                assert error.reason == Reason.STEP_MISMATCH
            else:
                raise AssertionError("it was admitted")
        if skips:
            worker.pending = dataclasses.replace(self._next(index), number=self.model.numbers[index] + 2)
            self._contribute(index)

    def load(self, index: int) -> None:
        """Load parameters: the open round is over."""
        worker = self.workers[index]
        if worker.attached is None or index not in self.model.present:
            return
        values = np.full(SIZE, next(self.loads), np.float32)
        self.rig.load(worker.attached.holder, values)
        self.model.values, self.model.load = values, self.model.load + 1
        self.model.round, self.model.anew = {}, set(self.model.numbers)
        for each in self.workers:
            for _, commit, _ in each.waiting:
                assert told(commit.outcome) == Answer(refused=str(Reason.STATE_CHANGED))
            each.waiting, each.pending = [], None

    # --- the run ------------------------------------------------------------------------------------------

    def _can_step(self, index: int) -> bool:
        worker = self.workers[index]
        return worker.attached is not None and not worker.waiting and index in self.model.present

    def _next(self, index: int) -> Given:
        scale = self.draws.choice([1.0, 1e-6, 1e8])
        gradient = (self.draws.standard_normal(SIZE) * scale).astype(np.float32)
        weighs = self.model.aggregation.reduction == "weighted_mean"
        weight = float(self.draws.choice([1.0, 2.0, 0.1, 7.0])) if weighs else 1.0
        return Given(gradient, weight, self.model.numbers[index] + 1, self.workers[index].client)

    def _contribute(self, index: int) -> None:
        worker = self.workers[index]
        if not self._can_step(index):
            return
        assert worker.attached is not None
        given = worker.pending or self._next(index)
        if given.number <= self.model.numbers[index]:  # it was answered, and its answer got lost
            worker.pending = None
            self.repeat(index)
            return
        worker.pending = given
        step = self.rig.staged(
            worker.attached.holder, given.gradient, given.number, base_step=worker.base, weight=given.weight
        )
        staleness = self.model.step - worker.base
        if staleness:
            if (start := self.model.starts.get(worker.base + 1)) is not None:
                self.model.arrivals.append(self.rig.now - start)
            self.model.drop(index, given.number, staleness)
        else:
            self.model.contribute(index, given, self.rig.now)
        worker.waiting.append((worker.attached, self.rig.commit(step), given.number))
        self.settle()

    def settle(self) -> None:
        """Have the model end its round if somebody looks, and compare whoever was answered."""
        model, looks = self.model, any(worker.waiting for worker in self.workers)
        if looks and model.has_failed(self.rig.now):
            for index, worker in enumerate(self.workers):
                if worker.waiting and index in model.round:
                    (_, commit, _), worker.waiting = worker.waiting[0], []
                    assert told(commit.outcome) == Answer(refused=str(Reason.NOT_ENOUGH_WORKERS))
            model.round = {}
        if looks and model.is_complete(self.rig.now):
            model.end_round()
        for index, worker in enumerate(self.workers):
            for _, commit, number in list(worker.waiting):
                answered = model.numbers[index] >= number
                assert told(commit.outcome) == (model.answers[index] if answered else None)
                if answered:
                    worker.waiting = []
                    self._received(index, commit)

    def _received(self, index: int, commit: Commit) -> None:
        worker = self.workers[index]
        assert commit.values[:SIZE].tobytes() == self.model.values.tobytes()
        worker.base, worker.pending = self.model.step, None

    def compare(self) -> None:
        """Compare the parameters and the numbers."""
        ledger, model = self.rig.session.ledger, self.model
        assert self.rig.parameters[:SIZE].tobytes() == model.values.tobytes()
        assert ledger.applied_step == model.step
        assert ledger.members.attached == model.present
        for index, number in model.numbers.items():
            assert ledger.members[index].number == number

    def finish(self) -> None:
        """All come back, and take a step together."""
        for index in range(len(self.workers)):
            self.join(index)
        for _ in range(2):
            for index in range(len(self.workers)):
                self.step(index)
            self.compare()

    def close(self) -> None:
        """End everything."""
        self.rig.close()
