"""The calls of CUDA that open memory of another process: the driver's own library, without CuPy or torch.

`libcuda.so.1` comes with the NVIDIA driver, and all CUDA programs in a process share it. Work goes through the primary
context of a device, which CuPy and torch use too. So one synchronisation waits for their work, and an address that is
opened here is an address to them. Unverified on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any, Final

import numpy.typing as npt

__all__ = ["CudaDriver", "CudaFailure", "PrimaryContext", "cuda_in_use", "load_library"]

_LIBRARY: Final = "libcuda.so.1"
_UUID_BYTES: Final = 16
_HANDLE_BYTES: Final = 64
_LAZY_PEER_ACCESS: Final = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag that there is


class CudaFailure(Exception):
    """A call of the driver failed, or there is no driver. The caller translates the failure for users."""


class _IpcMemHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * _HANDLE_BYTES)]


class CudaDriver:
    """The driver of this process. Thread-safe."""

    def __init__(self, library: Any = None) -> None:
        """Initialise the driver; a second initialisation does no harm.

        Args:
            library: a stand-in; None to load the driver's.

        Raises:
            CudaFailure: there is no driver, or it does not start.
        """
        if library is None:
            try:
                library = load_library()
            except OSError as problem:
                raise CudaFailure(f"there is no NVIDIA driver here: {problem}") from None
        self._library = library
        self.call("cuInit", ctypes.c_uint(0))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function whose result is a status; arguments are instances of ctypes.

        Raises:
            CudaFailure: the call failed, or this driver has no such function.
        """
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise CudaFailure(f"this driver is too old: it has no {name}") from None
        if status := function(*arguments):
            raise CudaFailure(f"{name} fails with {self._name_of(status)}")

    def uuids(self, index: int) -> tuple[bytes, ...]:
        """Return the UUIDs of a visible device, 16 bytes each: a part of a GPU has its own UUID, and then the GPU's.

        Raises:
            CudaFailure: there is no such device.
        """
        found, device = list[bytes](), self._device(index)
        for name in ("cuDeviceGetUuid_v2", "cuDeviceGetUuid"):
            uuid = (ctypes.c_ubyte * _UUID_BYTES)()
            try:
                self.call(name, ctypes.byref(uuid), device)
            except CudaFailure:
                if name == "cuDeviceGetUuid" and not found:
                    raise
            else:
                found.append(bytes(uuid))
        return tuple(dict.fromkeys(found))

    def context_on(self, uuid: bytes) -> PrimaryContext:
        """Hold the primary context of the device that has this UUID.

        Raises:
            CudaFailure: this process sees no such device.
        """
        for index in range(self._count()):
            if uuid in self.uuids(index):
                return PrimaryContext(self, self._device(index))
        raise CudaFailure(
            f"this process does not see the server's GPU {_shown(uuid)} among its {self._count()}; in a container hand "
            "it in with: docker run --gpus all, and unset CUDA_VISIBLE_DEVICES"
        )

    def ipc_handle(self, address: int) -> bytes:
        """Return the handle by which another process opens the allocation that begins at an address, 64 bytes.

        The thread's own context is that of the allocation. CuPy's call would hold the interpreter's lock.

        Raises:
            CudaFailure: the device, its driver or this container has no CUDA IPC.
        """
        handle = _IpcMemHandle()
        self.call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.reserved)

    def any_context(self) -> bool:
        """Tell whether this process uses a device already."""
        flags, active = ctypes.c_uint(), ctypes.c_int()
        for index in range(self._count()):
            self.call("cuDevicePrimaryCtxGetState", self._device(index), ctypes.byref(flags), ctypes.byref(active))
            if active.value:
                return True
        return False

    def _count(self) -> int:
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def _device(self, index: int) -> ctypes.c_int:
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        return device

    def _name_of(self, status: int) -> str:
        name = ctypes.c_char_p()
        known = not self._library.cuGetErrorName(ctypes.c_int(status), ctypes.byref(name)) and name.value
        return f"{name.value.decode()} ({status})" if known and name.value else f"error {status}"


class PrimaryContext:
    """The primary context of one device, held until `close`. Thread-safe. Closes twice without complaint."""

    def __init__(self, driver: CudaDriver, device: ctypes.c_int) -> None:
        """Retain the context; the first in a process creates it, for some hundred megabytes of the device.

        Raises:
            CudaFailure: the device cannot be used.
        """
        self._driver = driver
        self._device = device
        self._held = True
        self._context = ctypes.c_void_p()
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def open(self, handle: bytes) -> int:
        """Map an allocation of another process, and return its address.

        Raises:
            CudaFailure: the allocation cannot be mapped.
        """
        struct, address = _IpcMemHandle.from_buffer_copy(handle.ljust(_HANDLE_BYTES, b"\0")), ctypes.c_uint64()
        with self._current():
            flags = ctypes.c_uint(_LAZY_PEER_ACCESS)
            self._driver.call("cuIpcOpenMemHandle_v2", ctypes.byref(address), struct, flags)
        return address.value

    def unmap(self, address: int) -> None:
        """Undo `open`.

        Raises:
            CudaFailure: the address is not mapped.
        """
        with self._current():
            self._driver.call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def write(self, address: int, values: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the device; it may change afterwards.

        Raises:
            CudaFailure: the copy failed.
        """
        self._copy("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(values.ctypes.data), values.nbytes)

    def read(self, address: int, out: npt.NDArray[Any]) -> None:
        """Copy from the device into a contiguous array.

        Raises:
            CudaFailure: the copy failed.
        """
        self._copy("cuMemcpyDtoH_v2", ctypes.c_void_p(out.ctypes.data), ctypes.c_uint64(address), out.nbytes)

    def synchronize(self) -> None:
        """Wait for all work of this process on the device through this context.

        Raises:
            CudaFailure: some work failed.
        """
        with self._current():
            self._driver.call("cuCtxSynchronize")

    def close(self) -> None:
        """Let go of the context."""
        held, self._held = self._held, False
        if held:
            self._driver.call("cuDevicePrimaryCtxRelease_v2", self._device)

    def _copy(self, name: str, target: Any, source: Any, nbytes: int) -> None:
        if nbytes:
            with self._current():
                self._driver.call(name, target, source, ctypes.c_size_t(nbytes))

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Use the context in this thread for a block, and leave the thread's own as it was."""
        self._driver.call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


def load_library(*, only_if_loaded: bool = False) -> Any:
    """Load the driver's library, or find the one that this process has loaded.

    Raises:
        OSError: there is no such library.
    """
    return ctypes.CDLL(_LIBRARY, os.RTLD_NOW | os.RTLD_NOLOAD if only_if_loaded else ctypes.DEFAULT_MODE)


def cuda_in_use() -> bool:
    """Tell whether this process computes on a GPU already; nothing is loaded or started to find out."""
    try:
        library = load_library(only_if_loaded=True)
        if library.cuDeviceGetCount(ctypes.byref(ctypes.c_int())):  # not initialised
            return False
        return CudaDriver(library).any_context()
    except (OSError, CudaFailure):
        return False


def _shown(uuid: bytes) -> str:
    """Write a UUID as nvidia-smi does."""
    text = uuid.hex()
    return f"GPU-{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
