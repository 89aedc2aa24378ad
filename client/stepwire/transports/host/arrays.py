"""A session's tensors in memory shared on one host: views, and one copy each way for other arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Flat, Packer
from stepwire.transports.host.copies import Copy, copy_all
from stepwire.transports.host.memory import SharedMemory
from stepwire.transports.shared import GradientSource, SharedArrays
from stepwire.wire.dtypes import INT8

__all__ = ["HostArrays"]


class HostArrays(SharedArrays):
    """The tensors of one session in shared memory."""

    def __init__(self, memory: SharedMemory, packer: Packer) -> None:
        """Lay a session's tensors out in its memory."""
        super().__init__(packer, memory.gradient.dtype, memory.parameters.dtype)
        self._memory = memory
        tensors = packer.layout.tensors
        self._gradients = [memory.gradient[tensor.offset : tensor.end] for tensor in tensors]
        self._parameters = [memory.parameters[tensor.offset : tensor.end] for tensor in tensors]

    def close(self) -> None:
        """See `SharedMemory.close`."""
        self._memory.close()

    def forget_writes(self) -> None:
        """See `SharedMemory.forget_writes`."""
        self._memory.forget_writes()

    def gradient_views(self) -> dict[str, Any]:
        """Return views of the shared gradient."""
        return self._named(self._memory.gradient)

    def parameter_views(self) -> dict[str, Any]:
        """Return read-only views of the shared parameters."""
        return self._named(self._memory.parameters)

    def private_views(self) -> dict[str, Any]:
        """Return views of the private mapping of the parameters."""
        return self._named(self._memory.private)

    def read(self, targets: Flat) -> None:
        """Copy the parameters, tensor by tensor."""
        copy_all(list(zip(targets, self._parameters, strict=True)))

    def write(self, source: GradientSource) -> None:
        """See `SharedArrays.write`."""
        source.bring()
        gradient, layout = self._memory.gradient, self.packer.layout
        if gradient.dtype == INT8:
            self.packer.write(source.gradients, self.packer.ranges(0, layout.size), gradient, 0, source.feedback)
            return
        moving = list[Copy]()
        for place, array in zip(self._gradients, source.gradients, strict=True):
            if len(array) != len(place):
                continue
            if _is_elsewhere(array):
                moving.append((place, array))
            elif not _same(place, array):
                # A view that lies in the place of another tensor would be overwritten before its turn.
                moving.append((place, array.copy() if np.may_share_memory(array, gradient) else array))
        copy_all(moving)

    def _named(self, values: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        return {
            tensor.spec.name: values[tensor.offset : tensor.end].reshape(tensor.spec.shape)
            for tensor in self.packer.layout.tensors
        }


def _is_elsewhere(array: npt.NDArray[Any]) -> bool:
    """Tell that an array shows memory that NumPy has allocated, so none that is shared; False if that takes a look."""
    owner = array.base
    return array.flags.owndata if owner is None else type(owner) is np.ndarray and owner.flags.owndata


def _same(place: npt.NDArray[Any], array: npt.NDArray[Any]) -> bool:
    """Tell whether two 1-D arrays of one length are the same elements in the same memory."""
    return (
        array.dtype == place.dtype
        and array.strides == place.strides
        and array.__array_interface__["data"][0] == place.__array_interface__["data"][0]
    )
