"""A step whose outcome is unknown: its number, and a fingerprint that tells its repetition from another step.

A call that fails does not say whether its step was applied: perhaps only the reply was lost. The next call decides:

- The same gradient with the same options is the same step, repeated by its number. The server applies the step, or
  returns its first reply.
- Any other gradient is another step. `AttachOpened.applied_step` says whether the step in doubt was applied. After
  `opened` no older stream of the worker commits anything, so the number stays true. Then the other gradient becomes the
  next step.

Without the second case, a new gradient would get the reply of the old one, and would never be applied.

A third case needs another client. If one held the worker since, the number may be that client's step, and nobody can
tell any more whether the step in doubt was applied. Then the same gradient is refused: see `UntoldSteps`.

A fingerprint is computed after a failure alone: a good step does not pay for it. See `stepwire.arrays.fingerprints`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwire.arrays.error_feedback import ErrorFeedback
from stepwire.arrays.fingerprints import Fingerprint as ArrayFingerprint
from stepwire.arrays.fingerprints import fingerprint
from stepwire.errors import Reason, SessionNotReadyError, StepMismatchError, StepwireError
from stepwire.steps.call import StepCall
from stepwire.v1 import step_pb2

__all__ = ["Doubt", "Fingerprint", "UntoldSteps", "fingerprint_of_arrays", "unfinished"]

Fingerprint: TypeAlias = tuple[tuple[str, ArrayFingerprint], ...]
"""For each array its dtype, and the fingerprint of its bytes."""


_OF_THE_SENDING: Final = (
    "step",
    "epoch",
    "load",
    "base_step",
    "reply",
    "overlap",
    "in_shared_memory",
    "traceparent",
    "await_admission",
)
"""The fields of a step's opening that say nothing of its effect: its number, its reply, and what its link adds."""


@dataclasses.dataclass(frozen=True, slots=True)
class Doubt:
    """The record of a step whose outcome is unknown.

    Attributes:
        step: the number of the step.
        fingerprint: the fingerprint of its gradient; None for a gradient that cannot be read any more.
        options: the options that change the effect of the step, serialized.
        acquisitions: how often this client had acquired the worker; see `Hold.acquisitions`.
        feedback: the error feedback that waits for the outcome; None without one.
    """

    step: int
    fingerprint: Fingerprint | None
    options: bytes
    acquisitions: int = 0
    feedback: ErrorFeedback | None = None

    @classmethod
    def after(cls, call: StepCall, acquisitions: int) -> Doubt | None:
        """Return the doubt about a call that failed; None if its step was certainly not committed."""
        if not call.sent or (call.feed is not None and not call.feed.is_committed):
            return None
        return cls(call.begin.step, _fingerprint(call), _options(call), acquisitions, call.feedback)

    def under(self, acquisitions: int) -> Doubt:
        """Return the same doubt under another link's hold of the worker, which has come along."""
        return dataclasses.replace(self, acquisitions=acquisitions)

    def covers(self, call: StepCall) -> bool:
        """Tell whether a call is the same step again: the same gradient, with the same options.

        The gradient of a feed is still being made, so a feed is another step.
        """
        if call.feed is not None or self.fingerprint is None or self.options != _options(call):
            return False
        return self.fingerprint == _fingerprint(call)

    def resolve(self, *, applied: bool) -> None:
        """Settle the error feedback of the step, once its outcome is known."""
        if self.feedback is None:
            return
        if applied:
            self.feedback.accept()
        else:
            self.feedback.discard()


class UntoldSteps:
    """The steps whose outcome nobody can tell, since another client held the worker after them.

    To repeat one of them could apply it twice, so it is refused. That ends with the next pull, load or step: whoever
    knows the state of the present can send any gradient.
    """

    def __init__(self) -> None:
        """Start without one."""
        self._doubts: tuple[Doubt, ...] = ()

    @property
    def doubts(self) -> tuple[Doubt, ...]:
        """The steps, oldest first. The tuple is never changed, so that a pull can tell those that it came after."""
        return self._doubts

    def add(self, doubt: Doubt) -> None:
        """Add a step. What waits for its outcome, waits in vain."""
        doubt.resolve(applied=False)
        self._doubts = (*self._doubts, doubt)

    def check(self, call: StepCall) -> None:
        """Refuse a call that repeats one of the steps.

        Raises:
            StepMismatchError: it does.
        """
        for doubt in self._doubts:
            if doubt.covers(call):
                raise StepMismatchError(
                    f"step {doubt.step} of this gradient failed, and another client held the worker since: nobody can "
                    "tell whether it was applied, and nothing was sent. Pull the parameters and compute a new gradient",
                    metadata={"step_in_doubt": doubt.step},
                )

    def forget(self, doubts: tuple[Doubt, ...] | None = None) -> None:
        """Forget all steps; or those that were there at an earlier moment, if no more were added since."""
        if doubts is None or doubts is self._doubts:
            self._doubts = ()


def fingerprint_of_arrays(arrays: Iterable[npt.NDArray[np.generic]]) -> Fingerprint:
    """Return the fingerprint of arrays; lists that differ in any bit, or in order, have different ones."""
    return tuple((array.dtype.name, fingerprint(array)) for array in arrays)


def unfinished(step: int) -> SessionNotReadyError:
    """Return the refusal of another step, or of another gradient, while a step with `overlap` is half applied."""
    return SessionNotReadyError(
        f"step {step} was sent with overlap and broke off half applied; repeat it with the same gradients and "
        "overlap=True, or replace everything with load_state",
        reason=Reason.STEP_UNFINISHED,
        metadata={"unfinished_step": step},
    )


def _fingerprint(call: StepCall) -> Fingerprint | None:
    """Return the fingerprint of a call's gradient; None if a device failed, or the feed ended early."""
    try:
        call.bring()
    except StepwireError:
        return None
    gradients = call.gradients if call.feed is None else call.feed.complete(call.gradients)
    rows = [array for table in call.rows for array in (table.indices, table.values)]
    return None if gradients is None else fingerprint_of_arrays([*gradients, *rows])


def _options(call: StepCall) -> bytes:
    """Return the options that change the effect of a step: not its number, and nothing about its reply or its way."""
    begin = step_pb2.StepBegin()
    begin.CopyFrom(call.begin)
    for field in _OF_THE_SENDING:
        begin.ClearField(field)
    return begin.SerializeToString(deterministic=True)
