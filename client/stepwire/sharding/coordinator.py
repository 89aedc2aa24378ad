"""What all shards decide together before any of them steps: how far the gradient is clipped, or that it is skipped.

Each shard's server stages its part and says what the squares of it add up to. When all have, the client knows the norm
of the whole, and sends every server the same factors. A shard that breaks before it has staged is taken again alone,
while the others wait; one that breaks after the decision brings it along. So a step is decided once, or by nobody.
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
    """What the gradient of the whole is judged by.

    Attributes:
        whole: of its norm; None for none.
        groups: of each group's own norm, or None.
        formula: whose form of clipping.
        policy: what is done with NaN and Inf.
    """

    whole: float | None
    groups: tuple[float | None, ...]
    formula: ClipFormula
    policy: NonFinite


class Decision(NamedTuple):
    """What was decided of a step.

    Attributes:
        norms: of the whole gradient, with the factors of clipping.
        commit: what tells it to the servers.
    """

    norms: GradientNorms
    commit: step_pb2.StepCommit


class Abandoned(Exception):
    """This shard gives the step up, not for a reason of its own: nothing has been applied anywhere.

    Attributes:
        cause: why the step as a whole failed; None where another shard says it better.
    """

    def __init__(self, cause: StepwireError | None = None) -> None:
        """Give up."""
        super().__init__(str(cause or "another shard cannot take the step"))
        self.cause = cause


class Coordinator:
    """The decision about one step. Shards wait in `decide`, each in its thread."""

    def __init__(self, step: int, shards: int, bounds: Bounds) -> None:
        """Await what `shards` shards have staged for a step."""
        self.step = step
        self.decision: Decision | None = None
        self._bounds = bounds
        self._staged: list[step_pb2.GradientCheck | None] = [None] * shards
        self._failure: Abandoned | None = None
        self._changed = threading.Condition()

    def decide(self, shard: int, staged: step_pb2.GradientCheck, deadline: Deadline) -> step_pb2.StepCommit:
        """Say what a shard has staged, wait for the others, and return what all of them are to commit.

        Raises:
            Abandoned: another shard failed for good, not all had staged by the deadline, or the gradient is not finite
                under the policy `reject`.
        """
        with self._changed:
            self._staged[shard] = staged
            # Not after a failure: who gave up would have to be brought in line by another call.
            if self.decision is None and self._failure is None and None not in self._staged:
                self._rule([each for each in self._staged if each is not None])
            while self.decision is None and self._failure is None:
                if left := deadline.remaining():
                    self._changed.wait(left)
                else:
                    self._fail(Abandoned(self._late(deadline)))
            if self.decision is None:
                assert self._failure is not None
                raise Abandoned(self._failure.cause)
            return self.decision.commit

    def abandon(self) -> None:
        """Let nobody wait any longer: a shard failed for good. What is decided stays so."""
        self._fail(Abandoned())

    def _fail(self, failure: Abandoned) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _rule(self, staged: Sequence[step_pb2.GradientCheck]) -> None:
        try:
            self.decision = _ruling(self.step, staged, self._bounds)
        except NonFiniteGradientError as refusal:
            self._fail(Abandoned(refusal))
        self._changed.notify_all()

    def _late(self, deadline: Deadline) -> DeadlineExceededError:
        waiting = [shard for shard, staged in enumerate(self._staged) if staged is None]
        return DeadlineExceededError(
            f"step {self.step}: shards {waiting} had not received their gradient within {deadline.timeout_seconds} s; "
            "nothing was applied. Take the step again, or with a longer timeout",
            metadata={"timeout_seconds": deadline.timeout_seconds},
        )


def _ruling(step: int, staged: Sequence[step_pb2.GradientCheck], bounds: Bounds) -> Decision:
    norms, own = _norms([list(each.group_squared_norms) for each in staged], bounds)
    count = sum(each.non_finite_count for each in staged)
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


def _norms(parts: Sequence[Sequence[float]], bounds: Bounds) -> tuple[GradientNorms, tuple[float, ...]]:
    """Return the norms of the whole, with all factors, and the factors of the groups' own clipping, if there is any.

    Args:
        parts: of each shard, each group's sum of squares within `norms.RELATIVE_ERROR`.
        bounds: what clips.
    """
    columns = list(zip(*parts, strict=True))

    def sums(groups: Sequence[int]) -> Fraction:
        # The shards' sums are the truth as far as it is known here: they are added without further error.
        return sum((Fraction(part) for group in groups for part in columns[group]), Fraction(0))

    squared = [math.fsum(column) for column in columns]
    norms = gradient_norms(squared, sums, bounds.whole, bounds.groups, bounds.formula)
    if not any(bounds.groups):
        return norms, ()
    return norms, gradient_norms(squared, sums, None, bounds.groups, bounds.formula).coefficients
