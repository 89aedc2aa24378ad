"""Error feedback: what an encoding took off one gradient is added to the next.

    e = g + r              sent: encode(e)              r' = e − decode(encode(e))

So nothing is lost for good, only late, and training with coarse gradients converges as it does with fine ones (Seide
et al. 2014, "1-Bit Stochastic Gradient Descent"; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD").

**Exactly once.** A step that is repeated by its number has to bring the same bytes. So what a step leaves is pending
until `accept`, which the session calls when the step was applied; whatever goes wrong before then, the residual is what
it was, and the same gradients encode to the same bytes.

**What it costs.** Eight bytes an element on the client: the residual, and the pending one.

**What it does not do.** The residual belongs to the gradients before it: after parameters have been loaded it is stale,
and `clear` forgets it. It is on the client alone, so that a client that starts again starts without. Elements whose
gradient a step leaves out keep theirs, and it grows stale with them. It is of the scaled gradient, so that a change of
the loss scale makes it too large or too small for one step. Where steps accumulate on the server it is fed back from
each part of the sum to the next, as if they were updates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError
from stepwire.wire.int8_blocks import INT8

__all__ = ["ErrorFeedback", "check_feedback"]

_Floats = npt.NDArray[np.float32]


class ErrorFeedback:
    """The residual of one session's gradients. Not thread-safe: the session serialises its steps.

    Attributes:
        residual: what is added to the next gradient, `(size,) float32`; always finite.
    """

    def __init__(self, size: int) -> None:
        """Start with nothing left over from `size` flat elements."""
        self.residual: _Floats = np.zeros(size, np.float32)
        self._pending: _Floats = np.empty(size, np.float32)
        self._spans: list[tuple[int, int]] = []

    def keep(self, offset: int, wanted: _Floats, sent: _Floats) -> None:
        """Note what flat elements from `offset` on should have been, residual included, and what they will decode to.

        A block that is not finite leaves nothing: the residual it should add to will not be known either.

        Args:
            offset: first flat element.
            wanted: `(n,) float32`.
            sent: `(n,) float32`.
        """
        left = self._pending[offset : offset + len(wanted)]
        with np.errstate(all="ignore"):
            np.subtract(wanted, sent, out=left)
        if not np.isfinite(left).all():
            left[~np.isfinite(left)] = 0.0
        if self._spans and self._spans[-1][1] == offset:
            self._spans[-1] = (self._spans[-1][0], offset + len(wanted))
        else:
            self._spans.append((offset, offset + len(wanted)))

    def accept(self) -> None:
        """Take over what the last sending left: the step was applied."""
        if self._spans == [(0, len(self.residual))]:
            self.residual, self._pending = self._pending, self.residual
        else:
            for low, high in self._spans:
                self.residual[low:high] = self._pending[low:high]
        self._spans.clear()

    def discard(self) -> None:
        """Forget what sendings left since `accept`: the step was skipped, or failed, or is sent again."""
        self._spans.clear()

    def clear(self) -> None:
        """Forget the residual too."""
        self.discard()
        self.residual[:] = 0.0


def check_feedback(gradient_dtype: np.dtype[Any], error_feedback: bool) -> None:
    """Refuse error feedback for an encoding of gradients that takes nothing off, or too little to be kept.

    Raises:
        InvalidRequestError: it would take memory and do nothing.
    """
    if error_feedback and gradient_dtype != INT8:
        raise InvalidRequestError(
            f"error_feedback: the session's gradients travel as {gradient_dtype.name}, and only of 'int8' is anything "
            "kept; create the session with gradient_dtype 'int8', or without error feedback",
            metadata={"field": "error_feedback"},
        )
