"""Device memory that another process opens, and arrays in it. Unverified on a GPU.

The memory is an allocation of its own and never a part of a session's. The other process may write all of it, and may
hold it longer than the session lives.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

import numpy as np

from stepwire.errors import DataLossError
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.payloads import STORED, check_range
from stepwire_server.engines.protocol import EngineState

__all__ = ["CudaExportedMemory", "DeviceArray", "OnDevice"]

# cudaMalloc cuts smaller allocations out of blocks of this size, and the whole block is what is shared.
_WHOLE_BLOCK_BYTES: Final = 2 << 20


class DeviceArray:
    """Items of a dtype in device memory, `(n,)`, with the few methods of a NumPy array that a step needs.

    Attributes:
        memory: `(nbytes,) uint8` on the device.
        dtype: a wire dtype, or uint8.
        size: the number of items.
    """

    __slots__ = ("dtype", "memory", "size")

    def __init__(self, memory: Any, dtype: np.dtype[Any]) -> None:
        """View memory, all of it."""
        self.memory = memory
        self.dtype = dtype
        self.size: int = memory.nbytes // dtype.itemsize

    def __len__(self) -> int:
        """Count the items."""
        return self.size

    def __getitem__(self, items: slice) -> DeviceArray:
        """View some neighbouring items."""
        low, high, step = items.indices(self.size)
        assert step == 1
        return DeviceArray(self.memory[low * self.dtype.itemsize : high * self.dtype.itemsize], self.dtype)

    def view(self, dtype: Any) -> DeviceArray:
        """View the same bytes as another dtype."""
        return DeviceArray(self.memory, np.dtype(dtype))

    @property
    def stored(self) -> Any:
        """The array, as an argument of kernels."""
        return self.memory.view(STORED[self.dtype])


class OnDevice:
    """A result that a state leaves on the device; see `Pending`."""

    def __init__(self, state: EngineState) -> None:
        """Wait for all of a state."""
        self._state = state

    def wait(self) -> None:
        """See `Pending`."""
        self._state.settle()


class CudaExportedMemory:
    """See `ExportedMemory`. Not thread-safe.

    Attributes:
        handle: the handle of CUDA IPC.
        device_uuid: the UUID of the GPU.
    """

    def __init__(self, device: CudaDevice, nbytes: int, device_uuid: bytes) -> None:
        """Allocate.

        Raises:
            UnsupportedFeatureError, ResourceExhaustedError: as `Engine.export`.
        """
        assert nbytes > 0 and nbytes % _WHOLE_BLOCK_BYTES == 0
        self._device = device
        self.device_uuid = device_uuid
        self._memory: Any = device.allocate(nbytes)
        try:
            self.handle = device.handle(self._memory.data.ptr)
            self._wipe()
        except BaseException:
            self._memory = None  # an error that somebody keeps keeps this object
            raise

    def array(self, offset: int, dtype: np.dtype[Any], items: int) -> DeviceArray:
        """See `ExportedMemory.array`."""
        end = offset + items * dtype.itemsize
        check_range("exported memory", offset, end, self._memory.nbytes)
        return DeviceArray(self._memory[offset:end], dtype)

    def read(self, offset: int, nbytes: int) -> bytes:
        """See `ExportedMemory.read`."""
        return self._device.to_host(self.array(offset, np.dtype(np.uint8), nbytes).memory)

    def close(self) -> None:
        """See `ExportedMemory.close`: nothing is on its way to it any more when it is freed."""
        if self._memory is not None:
            try:
                with contextlib.suppress(DataLossError):
                    self._wipe()
            finally:
                self._memory = None

    def _wipe(self) -> None:
        self._device.zero(self._memory)
        self._device.settle(self._device.compute)
