"""Device memory that another process opens, and arrays in it. Unverified on a GPU.

The memory is an allocation of its own and never a part of a session's. The other process may write all of it, and may
hold it longer than the session lives.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

import numpy as np

from stepwire.errors import DataLossError, UnsupportedFeatureError
from stepwire.transports.cuda.driver import CudaDriver, CudaFailure
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.payloads import check_range
from stepwire_server.engines.protocol import EngineState

__all__ = ["CudaExportedMemory", "DeviceArray", "OnDevice"]

# cudaMalloc cuts smaller allocations out of blocks of this size, and the whole block is what is shared.
_WHOLE_BLOCK_BYTES: Final = 2 << 20


class DeviceArray:
    """Items of a dtype in device memory, `(n,)`, with the few methods of a NumPy array that a step needs.

    Attributes:
        owner: the allocation, `(m,) uint8`.
        address: the address of the first item.
        dtype: a wire dtype, or uint8.
        size: the number of items.
    """

    __slots__ = ("address", "dtype", "owner", "size")

    def __init__(self, owner: Any, dtype: np.dtype[Any], address: int | None = None, size: int | None = None) -> None:
        """View some of an allocation; without address and size all of it."""
        self.owner = owner
        self.address: int = owner.data.ptr if address is None else address
        self.dtype = dtype
        self.size: int = owner.nbytes // dtype.itemsize if size is None else size

    def __len__(self) -> int:
        """Count the items."""
        return self.size

    def __getitem__(self, items: slice) -> DeviceArray:
        """View some neighbouring items."""
        low, high, step = items.indices(self.size)
        assert step == 1
        return DeviceArray(self.owner, self.dtype, self.address + low * self.dtype.itemsize, max(high - low, 0))

    def view(self, dtype: Any) -> DeviceArray:
        """View the same bytes as another dtype."""
        other = np.dtype(dtype)
        return DeviceArray(self.owner, other, self.address, self.size * self.dtype.itemsize // other.itemsize)

    @property
    def nbytes(self) -> int:
        """The bytes of the items."""
        return self.size * self.dtype.itemsize


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

    def __init__(self, device: CudaDevice, driver: CudaDriver, nbytes: int) -> None:
        """Allocate.

        Raises:
            UnsupportedFeatureError, ResourceExhaustedError: as `Engine.export`.
        """
        assert nbytes > 0 and nbytes % _WHOLE_BLOCK_BYTES == 0
        self._device = device
        self.device_uuid = _uuid_of(device, driver)
        self._memory: Any = device.allocate(nbytes)
        try:
            self.handle = _handle_of(device, driver, self._memory.data.ptr)
            self._wipe()
        except BaseException:
            self._memory = None  # an error that somebody keeps keeps this object
            raise

    def array(self, offset: int, dtype: np.dtype[Any], items: int) -> DeviceArray:
        """See `ExportedMemory.array`."""
        check_range("exported memory", offset, offset + items * dtype.itemsize, self._memory.nbytes)
        return DeviceArray(self._memory, dtype, self._memory.data.ptr + offset, items)

    def read(self, offset: int, nbytes: int) -> bytes:
        """See `ExportedMemory.read`."""
        check_range("exported memory", offset, offset + nbytes, self._memory.nbytes)
        return self._device.to_host(self._memory.data.ptr + offset, nbytes)

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


def _uuid_of(device: CudaDevice, driver: CudaDriver) -> bytes:
    """Return the UUID. The driver numbers devices as the runtime does; CuPy cuts the UUID at the first zero byte.

    Raises:
        UnsupportedFeatureError: the driver does not tell it.
    """
    try:
        return driver.uuids(device.index)[0]
    except CudaFailure as problem:
        raise UnsupportedFeatureError(
            f"the driver does not tell the UUID of {device.name}: {problem}", metadata=_metadata(device)
        ) from problem


def _handle_of(device: CudaDevice, driver: CudaDriver, address: int) -> bytes:
    """Return what another process opens an allocation by.

    Raises:
        UnsupportedFeatureError: the device, its driver or this container has no CUDA IPC.
    """
    try:
        with device.current():
            device.bind()
            return driver.ipc_handle(address)
    except CudaFailure as problem:
        raise UnsupportedFeatureError(
            f"CUDA does not share memory of {device.name} with other processes ({problem}); in a container use: docker "
            "run --ipc=host --pid=host; under WSL and on parts of a GPU (MIG) there may be no CUDA IPC",
            metadata=_metadata(device),
        ) from problem


def _metadata(device: CudaDevice) -> dict[str, str]:
    return {"feature": "transport_cuda_ipc", "device": device.name}
