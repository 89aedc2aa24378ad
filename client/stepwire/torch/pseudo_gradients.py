"""The encoding of pseudo-gradients, with the error of each carried to the next."""

from __future__ import annotations

from typing import Any

import numpy as np

from stepwire.torch.options import RemoteOptions
from stepwire.torch.parameters import Arrays
from stepwire.wire.dtypes import BFLOAT16
from stepwire.wire.int8_blocks import INT8

__all__ = ["Encoding"]


class Encoding:
    """The wire dtype of pseudo-gradients, and what it has left out so far.

    Attributes:
        dtype: the wire dtype.
        residual: the error of the last pseudo-gradient that was applied, by name; empty for none.
    """

    def __init__(self, dtype: np.dtype[Any], options: RemoteOptions) -> None:
        """Start without an error."""
        self.dtype = dtype
        self.residual: Arrays = {}
        self._carries = options.error_feedback

    @property
    def in_session(self) -> bool:
        """The session encodes, and keeps the error itself."""
        return self._carries and self.dtype == INT8

    def encoded(self, gradient: Arrays) -> tuple[Arrays, Arrays]:
        """Return a pseudo-gradient as it is sent, and the error of that."""
        if self.dtype != BFLOAT16 or not self._carries:
            return gradient, {}
        if self.residual:
            gradient = {name: values + self.residual[name] for name, values in gradient.items()}
        sent = {name: values.astype(BFLOAT16) for name, values in gradient.items()}
        return sent, {name: gradient[name] - sent[name].astype(np.float32) for name in gradient}
