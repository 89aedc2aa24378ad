"""One GPU as CuPy gives access to it: memory, streams and events. Unverified on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from stepwire.errors import ResourceExhaustedError, UnsupportedFeatureError
from stepwire_server.engines.protocol import HostArray

__all__ = ["ALIGNMENT", "CudaDevice", "round_up"]

ALIGNMENT: Final = 256
"""Bytes that every array starts at a multiple of."""

_OUT_OF_MEMORY: Final = 2  # cudaErrorMemoryAllocation, which CuPy has no name for


class CudaDevice:
    """A device with the three streams that all work on it goes through. Thread-safe. Unverified on a GPU.

    Memory is allocated outside CuPy's pool. So the bytes accounted for are the bytes held, and a base address can be
    shared with another process.

    Attributes:
        cupy: the CuPy module, or a stand-in.
        index: the device, as CUDA numbers the visible ones.
        up: the stream of copies to the device.
        compute: the stream of kernels; nothing else changes state.
        down: the stream of copies to the host.
        multiprocessors: the number of multiprocessors.
    """

    def __init__(self, cupy: Any, index: int) -> None:
        """Use device `index` of this CuPy."""
        self.cupy = cupy
        self.index = index
        self._reclaim: Callable[[], None] = lambda: None
        with self.current():
            self.up, self.compute, self.down = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))
            self.multiprocessors: int = cupy.cuda.Device(index).attributes["MultiProcessorCount"]

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Make the device current in this thread; CuPy's device objects must not be shared among threads."""
        context: contextlib.AbstractContextManager[Any] = self.cupy.cuda.Device(self.index)
        return context

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Make the device and its stream of kernels current in this thread."""
        with self.current(), self.compute:
            yield

    @property
    def name(self) -> str:
        """The device's name, such as "cuda:0"."""
        return f"cuda:{self.index}"

    @property
    def description(self) -> str:
        """The description of the device, in words."""
        name: bytes = self.cupy.cuda.runtime.getDeviceProperties(self.index)["name"]
        return name.decode()

    def free_bytes(self) -> int:
        """Return the bytes of the device's memory that are free now."""
        with self.current():
            free: int = self.cupy.cuda.Device(self.index).mem_info[0]
        return free

    def on_shortage(self, reclaim: Callable[[], None]) -> None:
        """Call `reclaim` when memory runs out, before giving up."""
        self._reclaim = reclaim

    def allocate(self, nbytes: int) -> Any:
        """Return fresh device memory, `(nbytes,) uint8`, uninitialised; it is freed with its last reference.

        Raises:
            ResourceExhaustedError: there is none left.
        """
        with self.current():
            try:
                return self._allocate(nbytes)
            except self.cupy.cuda.runtime.CUDARuntimeError as problem:
                self._require_shortage(problem)
            self._reclaim()
            try:
                return self._allocate(nbytes)
            except self.cupy.cuda.runtime.CUDARuntimeError as problem:
                self._require_shortage(problem)
                raise ResourceExhaustedError(
                    f"no memory on {self.name} ({self.description}) for {nbytes} bytes; {self.free_bytes()} are free; "
                    "close a session or use another device",
                    metadata={"needed_bytes": nbytes, "device": self.name},
                ) from problem

    def pinned(self, nbytes: int) -> HostArray:
        """Return host memory that the device copies from and to by itself, `(nbytes,) uint8`."""
        with self.current():
            memory = self.cupy.cuda.PinnedMemory(nbytes)
            pointer = self.cupy.cuda.PinnedMemoryPointer(memory, 0)
        array: HostArray = np.frombuffer(pointer, np.uint8, nbytes)
        return array

    def event(self) -> Any:
        """Return a new event."""
        with self.current():
            return self.cupy.cuda.Event(disable_timing=True)

    def view(self, memory: Any, offset: int, count: int, dtype: Any) -> Any:
        """View `count` elements from byte `offset` of some memory on."""
        return self.cupy.ndarray(count, dtype, memory.data + offset)

    def handle(self, address: int) -> bytes:
        """Return what another process opens the allocation by that begins at an address, 64 bytes.

        Raises:
            UnsupportedFeatureError: the device, its driver or this container has no CUDA IPC.
        """
        with self.current():
            try:
                handle: bytes = self.cupy.cuda.runtime.ipcGetMemHandle(address)
            except self.cupy.cuda.runtime.CUDARuntimeError as problem:
                raise UnsupportedFeatureError(
                    f"CUDA does not share memory of {self.name} with other processes ({problem}); in a container use: "
                    "docker run --ipc=host --pid=host; under WSL and on parts of a GPU (MIG) there may be no CUDA IPC",
                    metadata={"feature": "transport_cuda_ipc", "device": self.name},
                ) from problem
        return handle

    def to_host(self, memory: Any) -> bytes:
        """Copy some memory to the host, behind all that the kernels' stream was asked for."""
        copied = np.empty(memory.nbytes, np.uint8)
        runtime = self.cupy.cuda.runtime
        with self.current():
            self.compute.synchronize()
            runtime.memcpy(copied.ctypes.data, memory.data.ptr, copied.nbytes, runtime.memcpyDeviceToHost)
        return copied.tobytes()

    def zero(self, memory: Any) -> None:
        """Fill with zeros, in the order of the kernels."""
        with self.current():
            memory.data.memset_async(0, memory.nbytes, self.compute)

    def _allocate(self, nbytes: int) -> Any:
        memory = self.cupy.cuda.Memory(max(nbytes, 1))
        return self.cupy.ndarray(nbytes, np.uint8, self.cupy.cuda.MemoryPointer(memory, 0))

    def _require_shortage(self, problem: Any) -> None:
        if problem.status != _OUT_OF_MEMORY:
            raise problem


def round_up(nbytes: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
