"""A session's tensors in memory shared on one host: views, and the one copy each way for arrays that lie elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Flat, Packer
from stepwire.steps.call import StepCall
from stepwire.steps.shared import SharedArrays
from stepwire.transports.host.memory import SharedMemory
from stepwire.wire.dtypes import INT8

__all__ = ["HostArrays"]


class HostArrays(SharedArrays):
    """The tensors of one session in shared memory."""

    def __init__(self, memory: SharedMemory, packer: Packer) -> None:
        """Lay a session's tensors out in its memory."""
        super().__init__(packer, memory.gradient.dtype, memory.parameters.dtype)
        self._memory = memory

    def close(self) -> None:
        """See `SharedMemory.close`."""
        self._memory.close()

    def forget_writes(self) -> None:
        """See `SharedMemory.forget_writes`."""
        self._memory.forget_writes()

    def _gradient_views(self) -> dict[str, Any]:
        return self._named(self._memory.gradient)

    def _parameter_views(self) -> dict[str, Any]:
        return self._named(self._memory.parameters)

    def _private_views(self) -> dict[str, Any]:
        return self._named(self._memory.private)

    def _read(self, targets: Flat) -> None:
        for tensor, target in zip(self._packer.layout.tensors, targets, strict=True):
            target[:] = self._memory.parameters[tensor.offset : tensor.end]

    def _write(self, call: StepCall) -> None:
        call.bring()
        gradient, layout = self._memory.gradient, self._packer.layout
        if gradient.dtype == INT8:
            self._packer.write(call.gradients, self._packer.ranges(0, layout.size), gradient, 0, call.feedback)
            return
        places = [gradient[tensor.offset : tensor.end] for tensor in layout.tensors]
        moving = [
            (place, array)
            for place, array in zip(places, call.gradients, strict=True)
            if len(array) == len(place) and not _same(place, array)
        ]
        # Views that lie in the place of another tensor would be overwritten before their turn.
        moving = [(place, array.copy() if np.may_share_memory(array, gradient) else array) for place, array in moving]
        with np.errstate(over="ignore"):  # as `Packer.write`: what float16 cannot hold becomes infinite
            for place, array in moving:
                place[:] = array

    def _named(self, values: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        return {
            tensor.spec.name: values[tensor.offset : tensor.end].reshape(tensor.spec.shape)
            for tensor in self._packer.layout.tensors
        }


def _same(place: npt.NDArray[Any], array: npt.NDArray[Any]) -> bool:
    """Whether two 1-D arrays of one length are the same elements in the same memory."""
    return (
        array.dtype == place.dtype
        and array.strides == place.strides
        and array.__array_interface__["data"][0] == place.__array_interface__["data"][0]
    )
