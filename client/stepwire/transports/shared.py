"""A session's tensors in memory that the session shares with its server, whatever memory that is."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np

from stepwire.arrays.error_feedback import ErrorFeedback
from stepwire.arrays.packing import Flat, Packer
from stepwire.errors import UnsupportedFeatureError
from stepwire.transports.cuda.stand_ins import StandIn
from stepwire.wire.dtypes import INT8

__all__ = ["GradientSource", "SharedArrays"]


class GradientSource(Protocol):
    """The gradient of one step, as shared memory writes it; a `StepCall` is one."""

    @property
    def gradients(self) -> Flat:
        """The gradient: 1-D arrays in layout order, empty for a tensor without a gradient."""

    @property
    def feedback(self) -> ErrorFeedback | None:
        """The error feedback of the encoding; None without one."""

    @property
    def on_device(self) -> Mapping[int, StandIn]:
        """The gradients in memory of a device, by index."""

    @property
    def recognised(self) -> object | None:
        """The mark of arrays that came before, and have not changed since but for their elements; None for others."""

    def bring(self, but: Collection[int] = ()) -> None:
        """Copy gradients from a device to the host, all but some."""


class SharedArrays(abc.ABC):
    """The tensors of one session in the memory of one stream. Closes twice without complaint.

    Attributes:
        packer: the layout of the tensors.
        gradient_dtype: the encoding of the gradient in the memory.
        reply_dtype: the encoding of the parameters in the memory.
    """

    def __init__(self, packer: Packer, gradient_dtype: np.dtype[Any], reply_dtype: np.dtype[Any]) -> None:
        """Keep the layout of the tensors and both encodings."""
        self.packer = packer
        self.gradient_dtype = gradient_dtype
        self.reply_dtype = reply_dtype

    def gradients(self) -> dict[str, Any]:
        """Return writable views of the gradient by name.

        Raises:
            UnsupportedFeatureError: gradients lie there as codes, not as arrays of elements.
        """
        if self.gradient_dtype == INT8:
            raise UnsupportedFeatureError(
                "gradients of dtype 'int8' lie in shared memory as codes; pass arrays to `step`, or create the session "
                "with gradient_dtype 'float32'",
                metadata={"field": "gradient_dtype", "feature": "wire_int8"},
            )
        return self.packer.in_order(self.gradient_views())

    def parameters(self, *, private: bool = False) -> dict[str, Any]:
        """Return views of the parameters by name: read-only views, or private views that may be written."""
        return self.packer.in_order(self.private_views() if private else self.parameter_views())

    @abc.abstractmethod
    def gradient_views(self) -> dict[str, Any]:
        """Return the tensors of the gradient by name, writable."""

    @abc.abstractmethod
    def parameter_views(self) -> dict[str, Any]:
        """Return the tensors of the parameters by name, read-only."""

    @abc.abstractmethod
    def private_views(self) -> dict[str, Any]:
        """Return the tensors of the parameters by name, writable for this process alone."""

    @abc.abstractmethod
    def forget_writes(self) -> None:
        """Show the server's parameters in private views again, also after writes to them."""

    @abc.abstractmethod
    def write(self, source: GradientSource) -> None:
        """Write a gradient to its place. A gradient that lies there already is not touched.

        Raises:
            UnavailableError: the device failed.
        """

    def write_again(self, flat: Flat, mark: object | None) -> bool:
        """Write a gradient like one that was written; False, with nothing done, where only `write` does that.

        Args:
            flat: the gradient: whole NumPy arrays in layout order, 1-D and of the memory's encoding.
            mark: the mark of arrays that are recognised; None for others.
        """
        return False

    @abc.abstractmethod
    def read(self, targets: Flat) -> None:
        """Copy the parameters into arrays in layout order.

        Raises:
            UnavailableError: the device failed.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Tell the server that the memory is not used any more. Arrays made of the memory keep their content."""
