"""The arrays that the client carries from one step to the next: error feedback, and parameters that patches change."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.arrays.error_feedback import ErrorFeedback, check_feedback
from stepwire.steps.call import StepCall
from stepwire.v1 import session_pb2, step_pb2
from stepwire.wire.dtypes import BFLOAT16, FLOAT32, dtype_from_wire

__all__ = ["Carry"]


class Carry:
    """The arrays of one session that outlive a step. The session serialises its calls.

    Attributes:
        feedback: the encoding error of gradients; None without error feedback.
    """

    def __init__(self, message: session_pb2.Session, size: int, *, error_feedback: bool) -> None:
        """Start without anything carried.

        Args:
            message: the session as the server described it.
            size: elements of the flat space.
            error_feedback: keep the encoding error of each gradient for the next one.

        Raises:
            InvalidRequestError: error feedback of an encoding that has none.
        """
        sent = dtype_from_wire(message.config.gradient_dtype, FLOAT32, "gradient_dtype", gradients=True)
        tables = [tensor.name for tensor in message.config.tensors if tensor.HasField("table")]
        check_feedback(sent, error_feedback, tables)
        self.feedback = ErrorFeedback(size) if error_feedback else None
        self._size = size
        self._patched: npt.NDArray[Any] | None = None
        self._patched_step: int | None = None

    def patched(self, begin: step_pb2.StepBegin) -> npt.NDArray[Any]:
        """Return the parameters that patches change, `(size,)` bfloat16, and ask in `begin` for patches of them."""
        if self._patched is None:
            self._patched = np.zeros(self._size, BFLOAT16)
        if self._patched_step is not None:
            begin.reply.base = self._patched_step
        return self._patched

    def applied(self, call: StepCall, result: step_pb2.StepResult) -> None:
        """Note that a step was applied, or skipped, or went on without the gradient."""
        if call.patched is not None:
            self._patched_step = result.step
        if call.feedback is not None and not result.skipped and not result.round.dropped:
            call.feedback.accept()

    def failed(self, call: StepCall) -> None:
        """Note that a step failed: a part of its reply may have changed the patched parameters."""
        if call.patched is not None:
            self._patched_step = None

    def loaded(self) -> None:
        """Note that parameters were loaded: nothing that is carried belongs to them."""
        self._patched_step = None
        if self.feedback is not None:
            self.feedback.clear()
