"""A session's tensors in memory shared on one GPU: views for GPU libraries, and copies for arrays of the host.

Unverified on a GPU.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Flat, Packer
from stepwire.layout import Placement
from stepwire.transports.cuda.memory import DeviceMemory, device_failures
from stepwire.transports.cuda.views import DeviceView
from stepwire.transports.shared import GradientSource, SharedArrays
from stepwire.wire.dtypes import elements_within, wire_bytes, wire_items

__all__ = ["DeviceArrays"]

# The bytes of one copy through memory of the host, which stays in the processor's cache.
_CHUNK_BYTES: Final = 4 << 20


class DeviceArrays(SharedArrays):
    """The tensors of one session in memory of a GPU."""

    def __init__(self, memory: DeviceMemory, packer: Packer) -> None:
        """Lay a session's tensors out in its memory."""
        super().__init__(packer, memory.gradient_dtype, memory.reply_dtype)
        self._memory = memory

    def close(self) -> None:
        """See `DeviceMemory.close`."""
        self._memory.close()

    def gradient_views(self) -> dict[str, Any]:
        """Return views of the gradient on the device."""
        return {tensor.spec.name: self._gradient_view(tensor) for tensor in self.packer.layout.tensors}

    def parameter_views(self) -> dict[str, Any]:
        """Return views of the parameters on the device."""
        mapping, dtype = self._memory.required(), self.reply_dtype
        return {
            tensor.spec.name: DeviceView(
                mapping,
                self._memory.parameters_at + tensor.offset * dtype.itemsize,
                tensor.spec.shape,
                dtype,
                of_parameters=True,
            )
            for tensor in self.packer.layout.tensors
        }

    def private_views(self) -> dict[str, Any]:
        """Return the views of `parameter_views`: this process alone sees them, and the next reply overwrites them."""
        return self.parameter_views()

    def forget_writes(self) -> None:
        """See `private_views`."""

    def _gradient_view(self, tensor: Placement) -> DeviceView:
        dtype = self.gradient_dtype
        return DeviceView(self._memory.required(), tensor.offset * dtype.itemsize, tensor.spec.shape, dtype)

    def write(self, source: GradientSource) -> None:
        """See `SharedArrays.write`. The device has finished all its work when this call returns."""
        tensors = self.packer.layout.tensors
        in_place = {
            index
            for index, stand_in in source.on_device.items()
            if stand_in.view.is_same(self._gradient_view(tensors[index]))
        }
        source.bring(in_place)
        with device_failures():
            if in_place:
                self._write_tensors(source, [index for index in range(len(tensors)) if index not in in_place])
            else:
                self._write_all(source)
            self._memory.required().synchronize()

    def _write_all(self, source: GradientSource) -> None:
        """Encode the whole gradient, a chunk at a time."""
        dtype, mapping = self.gradient_dtype, self._memory.required()
        most = elements_within(dtype, _CHUNK_BYTES)
        for offset, count, ranges in self.packer.chunks(most, dtype):
            chunk = np.empty(wire_items(dtype, count), dtype)
            self.packer.write(source.gradients, ranges, chunk, offset, source.feedback)
            mapping.write(wire_bytes(dtype, offset), chunk)

    def _write_tensors(self, source: GradientSource, indices: list[int]) -> None:
        """Encode some tensors; the others lie in their places, and those without a gradient stay as they are."""
        mapping, dtype = self._memory.required(), self.gradient_dtype
        for index in indices:
            tensor, values = self.packer.layout.tensors[index], source.gradients[index]
            if len(values) == tensor.count:
                with np.errstate(over="ignore"):  # as `Packer.write`
                    encoded = np.ascontiguousarray(values, dtype)
                mapping.write(tensor.offset * dtype.itemsize, encoded)

    def read(self, targets: Flat) -> None:
        """See `SharedArrays.read`. The server sends the result of a step once its reply lies in the memory."""
        dtype, mapping = self.reply_dtype, self._memory.required()
        for offset, count, ranges in self.packer.chunks(_CHUNK_BYTES // dtype.itemsize, dtype):
            chunk: npt.NDArray[Any] = np.empty(count, dtype)
            with device_failures():
                mapping.read(self._memory.parameters_at + offset * dtype.itemsize, chunk)
            self.packer.read(targets, ranges, chunk)
