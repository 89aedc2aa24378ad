"""Error feedback: the encoding error of one gradient is added to the next gradient.

    e = g + r              sent: encode(e)              r' = e − decode(encode(e))

The encoding delays the lost bits and does not drop them. Training with coarse gradients converges as training with
fine ones does. See Seide et al. 2014, "1-Bit Stochastic Gradient Descent", and Karimireddy et al. 2019, "Error Feedback
Fixes SignSGD".

**Exactly once.** A step that is repeated by its number has to bring the same bytes. So the residual of a step is
pending until `accept`, which the session calls once the step is applied. The residual stays as before after any failure
before `accept`, and the same gradients encode to the same bytes.

**Cost.** Eight bytes an element on the client: the residual, and the pending residual.

**Limits.** The residual belongs to the gradients before it. The residual is stale after a load of parameters, and
`clear` forgets the residual. The residual is on the client alone: a client that starts again starts without one.
Elements keep their residual through a step without their gradient. The residual is of the scaled gradient, so a change
of the loss scale makes the residual too large or too small for one step. With accumulation on the server, the residual
of each gradient of the sum goes to the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.errors import InvalidRequestError
from stepwire.wire.int8_blocks import INT8

__all__ = ["ErrorFeedback", "PendingResidual", "check_feedback"]

_Floats = npt.NDArray[np.float32]


class ErrorFeedback:
    """The residual of one session's gradients.

    The session serialises its steps. But the thread that packs the gradient of a step that broke off may pack one more
    chunk while the next step begins. So each sending keeps its errors by a `PendingResidual` of its own.

    Attributes:
        residual: the addend of the next gradient, `(size,) float32`; always finite.
    """

    def __init__(self, size: int) -> None:
        """Start with a residual of zeros for `size` flat elements."""
        self.residual: _Floats = np.zeros(size, np.float32)
        self._pending: _Floats = np.empty(size, np.float32)
        self._ranges: list[tuple[int, int]] = []
        self._latest: PendingResidual | None = None
        self._lock = threading.Lock()

    def begin(self) -> PendingResidual:
        """Forget the pending residual, and return that of the gradient which is sent from now on."""
        with self._lock:
            self._ranges.clear()
            self._latest = PendingResidual(self)
            return self._latest

    def keep(self, offset: int, wanted: _Floats, sent: _Floats, of: PendingResidual | None = None) -> None:
        """Keep the encoding error of flat elements as the pending residual.

        A block that is not finite leaves a residual of 0, since its error is not known.

        Args:
            offset: the first flat element.
            wanted: the values before the encoding, residual included, `(n,) float32`.
            sent: the values that the receiver decodes, `(n,) float32`.
            of: the sending; nothing is kept of one that is not the latest.
        """
        with self._lock:
            if of is None or of is self._latest:
                self._keep(offset, wanted, sent)

    def _keep(self, offset: int, wanted: _Floats, sent: _Floats) -> None:
        left = self._pending[offset : offset + len(wanted)]
        with np.errstate(all="ignore"):
            np.subtract(wanted, sent, out=left)
        if not np.isfinite(left).all():
            left[~np.isfinite(left)] = 0.0
        if self._ranges and self._ranges[-1][1] == offset:
            self._ranges[-1] = (self._ranges[-1][0], offset + len(wanted))
        else:
            self._ranges.append((offset, offset + len(wanted)))

    def accept(self) -> None:
        """Make the pending residual the residual: the step was applied."""
        with self._lock:
            self._latest = None
            if self._ranges == [(0, len(self.residual))]:
                self.residual, self._pending = self._pending, self.residual
            else:
                for low, high in self._ranges:
                    self.residual[low:high] = self._pending[low:high]
            self._ranges.clear()

    def discard(self) -> None:
        """Forget the pending residual: the step was skipped, failed, or is sent again."""
        with self._lock:
            self._latest = None
            self._ranges.clear()

    def clear(self) -> None:
        """Forget the residual and the pending residual."""
        self.discard()
        self.residual[:] = 0.0


class PendingResidual:
    """The pending residual of one sending of a gradient."""

    def __init__(self, feedback: ErrorFeedback) -> None:
        """Keep the errors of a sending in their place."""
        self._feedback = feedback

    @property
    def residual(self) -> _Floats:
        """See `ErrorFeedback`."""
        return self._feedback.residual

    def keep(self, offset: int, wanted: _Floats, sent: _Floats) -> None:
        """Keep the encoding error of flat elements, unless another sending has begun; see `ErrorFeedback.keep`."""
        self._feedback.keep(offset, wanted, sent, of=self)


def check_feedback(gradient_dtype: np.dtype[Any], error_feedback: bool, tables: Collection[str] | None = None) -> None:
    """Refuse error feedback for gradients in another encoding than int8, and for those of tables.

    Raises:
        InvalidRequestError: error feedback would use memory and change nothing.
    """
    if error_feedback and gradient_dtype != INT8:
        raise InvalidRequestError.of(
            "error_feedback",
            f"the session's gradients travel as {gradient_dtype.name}, and only 'int8' has error feedback; create the "
            "session with gradient_dtype 'int8', or without error feedback",
        )
    if error_feedback and tables:
        raise InvalidRequestError.of(
            "error_feedback",
            f"{sorted(tables)[0]!r} is a table, of whose rows no error is kept; create the session without it",
        )
