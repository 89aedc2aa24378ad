"""The decision that all shards share before any of them steps: the factors of clipping, or that the step is skipped.

The server of each shard checks its gradient, and sends the sums of squares. With the checks of all shards the client
knows the norm of the whole gradient, and sends every server the same factors. A shard that breaks before its check is
repeated alone, while the others wait. A shard that breaks after the decision brings the decision along. So a step is
decided once, or not at all.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from stepwire.connection.retry import Deadline
from stepwire.errors import DeadlineExceededError, NonFiniteGradientError, StepwireError
from stepwire.optimizers.gradient_treatment import ClipFormula, NonFinite
from stepwire.optimizers.norms import GradientNorms, gradient_norms
from stepwire.v1 import step_pb2

__all__ = ["Abandoned", "Bounds", "Coordinator", "Decision"]


class Bounds(NamedTuple):
    """The bounds that the gradient of the whole is checked against.

    Attributes:
        whole: the bound of its norm; None for none.
        groups: the bound of each group's own norm, or None.
        formula: the formula of clipping by norm.
        policy: the policy for NaN and Inf.
    """

    whole: float | None
    groups: tuple[float | None, ...]
    formula: ClipFormula
    policy: NonFinite


class Decision(NamedTuple):
    """The decision about a step.

    Attributes:
        norms: the norms of the whole gradient, with the factors of clipping; None if another worker decided.
        commit: the message that tells the decision to the servers.
    """

    norms: GradientNorms | None
    commit: step_pb2.StepCommit


class Abandoned(Exception):
    """This shard gives the step up, not for a reason of its own: nothing has been applied anywhere.

    Attributes:
        cause: the reason of the step as a whole; None if another shard has a better one.
    """

    def __init__(self, cause: StepwireError | None = None) -> None:
        """Give up."""
        super().__init__(str(cause or "another shard cannot take the step"))
        self.cause = cause


class Coordinator:
    """The coordinator of one step. Shards wait in `decide`, each in its thread.

    Attributes:
        step: the number of the step.
        decision: the decision; None before all shards have sent their checks.
    """

    def __init__(self, step: int, shards: int, bounds: Bounds) -> None:
        """Await the checks of `shards` shards for a step."""
        self.step = step
        self.decision: Decision | None = None
        self._bounds = bounds
        self._checks: list[step_pb2.GradientCheck | None] = [None] * shards
        self._failure: Abandoned | None = None
        self._changed = threading.Condition()

    def decide(self, shard: int, check: step_pb2.GradientCheck, deadline: Deadline) -> step_pb2.StepCommit:
        """Bring the check of a shard, wait for the others, and return the commit for all of them.

        Raises:
            Abandoned: another shard failed for good, or its check was late, or the gradient is not finite under the
                policy `reject`.
        """
        with self._changed:
            self._checks[shard] = check
            # Not after a failure: a shard that gave up would have to be brought in line by another call.
            if self.decision is None and self._failure is None and None not in self._checks:
                self._decide([each for each in self._checks if each is not None])
            while self.decision is None and self._failure is None:
                if left := deadline.remaining():
                    self._changed.wait(left)
                else:
                    self._fail(Abandoned(self._late(deadline)))
            if self.decision is None:
                assert self._failure is not None
                raise Abandoned(self._failure.cause)
            return self.decision.commit

    def follow(self, result: step_pb2.StepResult) -> None:
        """Adopt the decision of another worker, which the result of a shard tells.

        That shard's check never comes, so the others would wait for it in vain.
        """
        with self._changed:
            if self.decision is None and not result.round.dropped:
                self.decision = Decision(None, _followed(result, any(self._bounds.groups)))
                self._changed.notify_all()

    def abandon(self) -> None:
        """End all waiting: a shard failed for good. A decision stays as it is."""
        self._fail(Abandoned())

    def _fail(self, failure: Abandoned) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _decide(self, checks: Sequence[step_pb2.GradientCheck]) -> None:
        try:
            self.decision = _decision(self.step, checks, self._bounds)
        except NonFiniteGradientError as refusal:
            self._fail(Abandoned(refusal))
        self._changed.notify_all()

    def _late(self, deadline: Deadline) -> DeadlineExceededError:
        waiting = [shard for shard, check in enumerate(self._checks) if check is None]
        return DeadlineExceededError(
            f"step {self.step}: shards {waiting} had not received their gradient within {deadline.timeout_seconds} s; "
            "nothing was applied. Repeat the step, or with a longer timeout",
            metadata={"timeout_seconds": deadline.timeout_seconds},
        )


def _decision(step: int, checks: Sequence[step_pb2.GradientCheck], bounds: Bounds) -> Decision:
    norms, own = _norms([list(each.group_squared_norms) for each in checks], bounds)
    count = sum(each.non_finite_count for each in checks)
    finite = not count and math.isfinite(norms.total)
    if not finite and bounds.policy == "reject":
        raise NonFiniteGradientError(
            f"step {step}: the gradient holds NaN or Inf ({count} elements in all), or is beyond float32 when summed; "
            "nothing was applied. Mend the gradient, or create the session with the policy 'skip' or 'allow'",
            metadata={"non_finite_count": count},
        )
    if not finite and bounds.policy == "skip":
        return Decision(norms, step_pb2.StepCommit(skip=True))
    return Decision(norms, step_pb2.StepCommit(clip_coefficient=norms.coefficient, group_coefficients=own))


def _followed(result: step_pb2.StepResult, by_group: bool) -> step_pb2.StepCommit:
    """Return the commit that gives other shards the factors of a shard's result."""
    if result.skipped:
        return step_pb2.StepCommit(skip=True)
    if by_group:  # a group's factor in a result is the whole of it
        factors = [group.clip_coefficient for group in result.telemetry.groups]
        return step_pb2.StepCommit(clip_coefficient=1.0, group_coefficients=factors)
    return step_pb2.StepCommit(clip_coefficient=result.telemetry.clip_coefficient)


def _norms(sums: Sequence[Sequence[float]], bounds: Bounds) -> tuple[GradientNorms, tuple[float, ...]]:
    """Return the norms of the whole, with all factors, and the factors of the groups' own clipping, if any.

    Args:
        sums: for each shard, each group's sum of squares within `norms.RELATIVE_ERROR`.
        bounds: the bounds of clipping.
    """
    columns = list(zip(*sums, strict=True))

    def exact(groups: Sequence[int]) -> Fraction:
        # Nothing more exact than the shards' sums is known here: they are added without further error.
        return sum((Fraction(each) for group in groups for each in columns[group]), Fraction(0))

    squared = [math.fsum(column) for column in columns]
    norms = gradient_norms(squared, exact, bounds.whole, bounds.groups, bounds.formula)
    if not any(bounds.groups):
        return norms, ()
    return norms, gradient_norms(squared, exact, None, bounds.groups, bounds.formula).coefficients
