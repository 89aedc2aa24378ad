"""A session's tensors in memory shared on one GPU: views for its libraries, and copies for arrays of the host.

Unverified on a GPU.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Flat, Packer
from stepwire.layout import Placement
from stepwire.steps.call import StepCall
from stepwire.steps.shared import SharedArrays
from stepwire.transports.cuda.memory import DeviceMemory, device_failures
from stepwire.transports.cuda.views import DeviceView
from stepwire.wire.dtypes import elements_within, wire_bytes, wire_items

__all__ = ["DeviceArrays"]

# Of what is copied at a time through memory of the host, which stays in the processor's cache.
_PIECE_BYTES: Final = 4 << 20


class DeviceArrays(SharedArrays):
    """The tensors of one session in memory of a GPU."""

    def __init__(self, memory: DeviceMemory, packer: Packer) -> None:
        """Lay a session's tensors out in its memory."""
        super().__init__(packer, memory.gradient_dtype, memory.reply_dtype)
        self._memory = memory

    def close(self) -> None:
        """See `DeviceMemory.close`."""
        self._memory.close()

    def _gradient_views(self) -> dict[str, Any]:
        return {tensor.spec.name: self._gradient_view(tensor) for tensor in self._packer.layout.tensors}

    def _parameter_views(self) -> dict[str, Any]:
        mapping, dtype = self._memory.required(), self._reply_dtype
        return {
            tensor.spec.name: DeviceView(
                mapping,
                self._memory.parameters_at + tensor.offset * dtype.itemsize,
                tensor.spec.shape,
                dtype,
                of_parameters=True,
            )
            for tensor in self._packer.layout.tensors
        }

    def _private_views(self) -> dict[str, Any]:
        """Return what others return too: nobody else sees this memory, and the next answer overwrites it."""
        return self._parameter_views()

    def forget_writes(self) -> None:
        """See `_private_views`."""

    def _gradient_view(self, tensor: Placement) -> DeviceView:
        dtype = self._gradient_dtype
        return DeviceView(self._memory.required(), tensor.offset * dtype.itemsize, tensor.spec.shape, dtype)

    def _write(self, call: StepCall) -> None:
        """See `SharedArrays._write`; everything that was asked of the device is done when this returns."""
        tensors = self._packer.layout.tensors
        in_place = {
            index
            for index, stand_in in call.on_device.items()
            if stand_in.view.is_same(self._gradient_view(tensors[index]))
        }
        call.bring(in_place)
        with device_failures():
            if in_place:
                self._write_tensors(call, [index for index in range(len(tensors)) if index not in in_place])
            else:
                self._write_all(call)
            self._memory.required().synchronize()

    def _write_all(self, call: StepCall) -> None:
        """Encode the whole gradient, a piece at a time."""
        dtype, mapping = self._gradient_dtype, self._memory.required()
        most = elements_within(dtype, _PIECE_BYTES)
        for offset, count, parts in self._packer.chunks(most, dtype):
            piece = np.empty(wire_items(dtype, count), dtype)
            self._packer.write(call.gradients, parts, piece, offset, call.feedback)
            mapping.write(wire_bytes(dtype, offset), piece)

    def _write_tensors(self, call: StepCall, indices: list[int]) -> None:
        """Encode some tensors beside others that lie in their places; those without a gradient stay as they are."""
        mapping, dtype = self._memory.required(), self._gradient_dtype
        for index in indices:
            tensor, values = self._packer.layout.tensors[index], call.gradients[index]
            if len(values) == tensor.count:
                with np.errstate(over="ignore"):  # as `Packer.write`
                    encoded = np.ascontiguousarray(values, dtype)
                mapping.write(tensor.offset * dtype.itemsize, encoded)

    def _read(self, targets: Flat) -> None:
        """See `SharedArrays._read`; the server sends a step's result when its answer is there."""
        dtype, mapping = self._reply_dtype, self._memory.required()
        for offset, count, parts in self._packer.chunks(_PIECE_BYTES // dtype.itemsize, dtype):
            piece: npt.NDArray[Any] = np.empty(count, dtype)
            with device_failures():
                mapping.read(self._memory.parameters_at + offset * dtype.itemsize, piece)
            self._packer.read(targets, parts, piece)
