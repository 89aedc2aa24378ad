"""A session's tensors in memory shared on one host: views, and one copy each way for other arrays."""

from __future__ import annotations

import operator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Flat, Packer
from stepwire.arrays.ranges import Ranges
from stepwire.transports.host.copies import Copy, are_few, copy_all
from stepwire.transports.host.memory import SharedMemory
from stepwire.transports.shared import GradientSource, SharedArrays
from stepwire.wire.dtypes import INT8

__all__ = ["HostArrays"]


_owner: Final = operator.attrgetter("base.base")
"""Of a view of an array: what has the array's memory; None for the array itself."""


class HostArrays(SharedArrays):
    """The tensors of one session in shared memory."""

    def __init__(self, memory: SharedMemory, packer: Packer) -> None:
        """Lay a session's tensors out in its memory."""
        super().__init__(packer, memory.gradient.dtype, memory.parameters.dtype)
        self._memory = memory
        tensors = packer.layout.tensors
        self._shown = self._named(memory.parameters)
        self._recognised: object | None = None  # the mark of gradients all of which have to be copied, or none
        self._moves, self._are_few = True, are_few(memory.parameters.nbytes)
        counts, last = sum(tensor.count for tensor in tensors), tensors[-1].end if tensors else 0
        run = memory.gradient[:last]
        is_run = counts == last and run.dtype != INT8 and are_few(run.nbytes)
        self._run = run if is_run else None
        self._gradients = [memory.gradient[tensor.offset : tensor.end] for tensor in tensors]
        self._starts = list(map(_address, self._gradients))
        low = _address(memory.gradient)
        self._area = low, low + memory.gradient.nbytes
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
        """Return read-only views of the shared parameters, the same ones each time."""
        return dict(self._shown)

    def private_views(self) -> dict[str, Any]:
        """Return views of the private mapping of the parameters."""
        return self._named(self._memory.private)

    def read(self, targets: Flat) -> None:
        """Copy the parameters, all at once or tensor by tensor."""
        if type(targets) is not Ranges:
            copy_all(list(zip(targets, self._parameters, strict=True)))
        elif self._are_few:
            targets.made()[0][:] = self._memory.parameters
        else:
            copy_all([(targets.made()[0], self._memory.parameters)])

    def write(self, source: GradientSource) -> None:
        """See `SharedArrays.write`."""
        if (mark := source.recognised) is not None and mark is self._recognised:
            if self._moves:
                self._write_all(source.gradients)
            return
        source.bring()
        gradient, layout = self._memory.gradient, self.packer.layout
        if gradient.dtype == INT8:
            self.packer.write(source.gradients, self.packer.ranges(0, layout.size), gradient, 0, source.feedback)
            return
        if not self._hold_some(source.gradients):
            self._recognised, self._moves = mark, True
            self._write_all(source.gradients)
        else:
            self._write_moving(source.gradients, mark)

    def write_again(self, flat: Flat, mark: object | None) -> bool:
        """See `SharedArrays.write_again`."""
        if mark is None or mark is not self._recognised:
            # A view of an array that owns its memory does not lie here.
            if any([owner is not None for owner in map(_owner, flat)]) and self._hold_some(flat):
                self._write_moving(flat, mark)
                return True
            self._recognised, self._moves = mark, True
        if not self._moves:
            return True
        if (run := self._run) is not None:
            np.concatenate(flat, out=run)
        else:
            self._write_all(flat)
        return True

    def _hold_some(self, gradients: Flat) -> bool:
        gradient = self._memory.gradient
        return any([np.may_share_memory(array, gradient) for array in gradients])

    def _write_moving(self, gradients: Flat, mark: object | None) -> None:
        """Copy gradients some of which lie in this memory, perhaps in their places."""
        moving = self._moving(gradients)
        if not moving:
            self._recognised, self._moves = mark, False
        copy_all(moving)

    def _write_all(self, gradients: Flat) -> None:
        """Copy gradients none of which lies in this memory: few bytes in one go, where no padding lies between them."""
        run, dtype = self._run, self.gradient_dtype
        if run is not None and all([len(array) and array.dtype == dtype for array in gradients]):
            np.concatenate(gradients, out=run)
        else:
            copy_all([pair for pair in zip(self._gradients, gradients, strict=True) if len(pair[0]) == len(pair[1])])

    def _moving(self, gradients: Flat) -> list[Copy]:
        """Return the copies of those gradients that do not lie in their places."""
        moving, (low, high) = list[Copy](), self._area
        for place, start, array in zip(self._gradients, self._starts, gradients, strict=True):
            if len(array) != len(place):
                continue
            at = _address(array)
            if at == start and (array.dtype, array.strides) == (place.dtype, place.strides):
                continue
            if not array.flags.c_contiguous or low - array.nbytes < at < high:
                # A view that lies in the place of another tensor would be overwritten before its turn.
                array = array.copy()
            moving.append((place, array))
        return moving

    def _named(self, values: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        return {
            tensor.spec.name: values[tensor.offset : tensor.end].reshape(tensor.spec.shape)
            for tensor in self.packer.layout.tensors
        }


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
