"""One round: the contributions that become one step, and the moment at which it is over."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence

from stepwire.errors import NotEnoughWorkersError, StepMismatchError, StepwireError
from stepwire.optimizers.aggregation import Aggregation
from stepwire_server.aggregation.grace import Grace
from stepwire_server.records.round_result import Contributor
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.steps.check_gradient import GradientCheck
from stepwire_server.steps.reply import ReplyWriter
from stepwire_server.steps.row_gradients import NamedRows
from stepwire_server.steps.step import Hold, Step

__all__ = ["Contribution", "Round"]


@dataclasses.dataclass
class Contribution:
    """One worker's gradient that counts. The gradient itself is in the round's reduction.

    Attributes:
        request: the step that the gradient came with; its number is the contribution's.
        holder: the hold of the worker.
        part: what the round's result tells of it.
        arrived: the clock reading of its commit.
        asked: the step that was asked for last: its reply counts, and nothing else of it.
        writer: the place of its reply; None until somebody waits for it.
        rows: the rows of tables that go back, as they were named last.
        replaced: another client steps as the worker by now. Its own gradient is not in the round.
    """

    request: StepRequest
    holder: Hold
    part: Contributor
    arrived: float
    asked: StepRequest
    writer: ReplyWriter | None = None
    rows: Sequence[NamedRows] = ()
    replaced: bool = False

    def check_number(self, number: int) -> None:
        """Refuse another contribution of the worker before this one is answered.

        Raises:
            StepMismatchError: it has another number.
        """
        if number != self.request.step:
            raise StepMismatchError(
                f"contribution {self.request.step} of worker {self.holder.worker} is in the open round, and {number} "
                "comes before its answer; send that one again",
                metadata={"expected_step": self.request.step, "actual_step": number},
            )


class Round:
    """The contributions of one round, from the first one until its step is applied. The session serialises its calls.

    Attributes:
        opened: the clock reading of the first contribution.
        step: the step of the reduced gradient, while a decision is awaited; None before.
        check: the check of the same, for the coordinator.
        result: the result of the step; None before.
        failure: the error that ended the round without a step; None without one.
        reduce_seconds: the time of making one gradient of all of them, so far.
    """

    def __init__(self, aggregation: Aggregation, opened: float) -> None:
        """Open a round."""
        self._aggregation = aggregation
        self._contributions: dict[int, Contribution] = {}
        self.opened = opened
        self.step: Step | None = None
        self.check: GradientCheck | None = None
        self.result: StepResult | None = None
        self.failure: StepwireError | None = None
        self.reduce_seconds = 0.0

    def __len__(self) -> int:
        """Count the contributions."""
        return len(self._contributions)

    def __iter__(self) -> Iterator[Contribution]:
        """Iterate over the contributions, by worker."""
        return iter([self._contributions[worker] for worker in sorted(self._contributions)])

    def of(self, worker: int) -> Contribution | None:
        """Return the contribution of a worker; None without one."""
        return self._contributions.get(worker)

    def add(self, contribution: Contribution) -> None:
        """Note a contribution whose gradient has been added."""
        self._contributions[contribution.part.worker] = contribution

    @property
    def is_over(self) -> bool:
        """The round has its step, or has failed."""
        return self.result is not None or self.failure is not None

    @property
    def has_enough(self) -> bool:
        """As many workers have contributed as the round needs."""
        return len(self) >= self._aggregation.required

    @property
    def lead(self) -> Contribution:
        """The contribution of the lowest worker, whose numbers are those of the step."""
        return next(iter(self))

    def ends_at(self, present: Collection[int], grace: Grace) -> float:
        """Return the clock reading at which the round ends, if nothing more happens; -inf for now.

        Args:
            present: the workers that are present.
            grace: the grace for stragglers.
        """
        if not self.has_enough:
            return self.opened + self._aggregation.round_timeout
        if len(self) == self._aggregation.workers or self._contributions.keys() >= set(present):
            return -math.inf
        return self.opened + grace.seconds()

    def divisor(self) -> float:
        """Return the divisor of the sum."""
        reduction = self._aggregation.reduction
        if reduction == "weighted_mean":
            return math.fsum(contribution.part.weight for contribution in self)
        return 1.0 if reduction == "sum" else float(len(self))

    def missing_tensors(self) -> frozenset[int]:
        """Return the tensors that no contribution has; where only some lack one, theirs counts as zeros."""
        return frozenset.intersection(*(contribution.request.missing for contribution in self))

    def too_few(self) -> NotEnoughWorkersError:
        """Return the error of a round that has waited long enough."""
        aggregation, contributed = self._aggregation, ", ".join(str(each.part.worker) for each in self)
        missing = ",".join(str(index) for index in range(aggregation.workers) if index not in self._contributions)
        return NotEnoughWorkersError(
            f"{len(self)} of {aggregation.required} workers contributed within {aggregation.round_timeout:g} s: "
            f"{contributed}; missing: {missing[:200]}. Nothing was applied: start the missing workers and step again, "
            "or create the session with a smaller `required_workers`",
            metadata={"missing_workers": missing, "required_workers": aggregation.required},
        )
