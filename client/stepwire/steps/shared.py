"""A session's tensors in memory that it shares with its server: what a step sends of them, and what it takes."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np

from stepwire.arrays.packing import Container, Flat, Packer
from stepwire.errors import UnsupportedFeatureError
from stepwire.steps.call import StepCall
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire.wire.dtypes import INT8

__all__ = ["SharedArrays"]


class SharedArrays(abc.ABC):
    """The tensors of one session in the memory of one stream. Closes twice without complaint."""

    def __init__(self, packer: Packer, gradient_dtype: np.dtype[Any], reply_dtype: np.dtype[Any]) -> None:
        """Remember how tensors lie there."""
        self._packer = packer
        self._gradient_dtype = gradient_dtype
        self._reply_dtype = reply_dtype

    def gradients(self) -> dict[str, Any]:
        """Return writable views of the gradient by name.

        Raises:
            UnsupportedFeatureError: gradients lie there as codes, which are no arrays of elements.
        """
        if self._gradient_dtype == INT8:
            raise UnsupportedFeatureError(
                "gradients of dtype 'int8' lie in shared memory as codes; pass arrays to `step`, or create the session "
                "with gradient_dtype 'float32'",
                metadata={"field": "gradient_dtype", "feature": "wire_int8"},
            )
        return self._gradient_views()

    def parameters(self, *, private: bool = False) -> dict[str, Any]:
        """Return views of the parameters by name: read-only, or private ones that may be written."""
        return self._private_views() if private else self._parameter_views()

    @abc.abstractmethod
    def forget_writes(self) -> None:
        """Show in private views what the server has, also where they were written."""

    def carries(self, call: StepCall) -> bool:
        """Tell whether a step is one in shared memory: in the session's own dtypes, applied and answered as a whole."""
        begin = call.begin
        return (
            call.gradient_dtype == self._gradient_dtype
            and call.reply_dtype == self._reply_dtype
            and not begin.overlap
            and begin.reply.mode != step_pb2.REPLY_MODE_CHANGED
            and call.feed is None
        )

    def message(self, call: StepCall, *, again: bool) -> bytes:
        """Return what to send for a step, its gradient put in place; where it was applied, for its answer alone."""
        if not again:
            if call.feedback is not None:
                call.feedback.discard()
            self._write(call)
        begin = step_pb2.StepBegin()
        begin.CopyFrom(call.begin)
        begin.in_shared_memory = True
        return pb.AttachRequest(begin=begin, commit=call.commit).SerializeToString()

    def take(self, call: StepCall) -> None:
        """Take the answer of a step: by a copy, or by views where the user wants those."""
        if not call.wants_answer:
            return
        if call.views is not None:
            self._fill(call.views)
        else:
            self._read(call.targets)
        if call.on_tensor is not None:
            first, count = call.begin.reply.first, len(self._packer.layout.tensors)
            for index in (*first, *(index for index in range(count) if index not in first)):
                call.on_tensor(index)

    @abc.abstractmethod
    def close(self) -> None:
        """Tell the server that the memory is not used any more; what was made of it keeps what it shows."""

    def _fill(self, views: Container) -> None:
        named = self._parameter_views()
        if isinstance(views, list):
            views[:] = [named[str(position)] for position in range(len(named))]
        else:
            views |= named

    @abc.abstractmethod
    def _gradient_views(self) -> dict[str, Any]:
        """Return the tensors of the gradient by name."""

    @abc.abstractmethod
    def _parameter_views(self) -> dict[str, Any]:
        """Return the tensors of the parameters by name."""

    @abc.abstractmethod
    def _private_views(self) -> dict[str, Any]:
        """Return the tensors of the parameters by name, writable for this process alone."""

    @abc.abstractmethod
    def _write(self, call: StepCall) -> None:
        """Put a gradient in its place. What lies there already is not touched."""

    @abc.abstractmethod
    def _read(self, targets: Flat) -> None:
        """Copy the parameters."""
