"""One GPU as CuPy gives access to it: memory, streams and events. Unverified on a GPU."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, TypeVar

import numpy as np

from stepwire.errors import DataLossError, Reason, ResourceExhaustedError
from stepwire_server.engines.protocol import HostArray

__all__ = ["ALIGNMENT", "CudaDevice", "address_of", "round_up"]

ALIGNMENT: Final = 256
"""Bytes that every array starts at a multiple of."""

# CUDA's own numbers, which CuPy has no names for in every version.
_TO_DEVICE: Final = 1
_TO_HOST: Final = 2
_ON_DEVICE: Final = 3
_MAPPED: Final = 2

_OUT_OF_MEMORY: Final = 2  # of the runtime and of the driver alike; CuPy has no name for it

# Statuses after which every later call of the process on this device fails alike. The runtime and the driver number
# them alike. CUDA's documentation says of each: "the process must be terminated and relaunched".
_FATAL: Final = {
    214: "uncorrectable memory error",
    220: "uncorrectable NVLink error",
    226: "contained hardware error",
    700: "illegal address",
    702: "launch timeout",
    709: "context is destroyed",
    710: "device-side assertion",
    714: "hardware stack error",
    715: "illegal instruction",
    716: "misaligned address",
    717: "invalid address space",
    718: "invalid program counter",
    719: "launch failure",
    721: "tensor memory leak",
}

# Sleeping costs a small step some 50 µs until its core wakes; spinning longer than that would take a core from others.
_SPIN_SECONDS: Final = 50e-6

Returned = TypeVar("Returned")


class CudaDevice:
    """A device with the three streams that all work on it goes through. Thread-safe. Unverified on a GPU.

    Memory is allocated outside CuPy's pool. So the bytes accounted for are the bytes held, and a base address can be
    shared with another process.

    Attributes:
        cupy: the CuPy module, or a stand-in.
        index: the device, as CUDA numbers the visible ones.
        lost: the error after which nothing works on the device until the process is started again, or None.
        up: the stream of copies to the device.
        compute: the stream of kernels; nothing else changes state.
        down: the stream of copies to the host.
        multiprocessors: the number of multiprocessors.
    """

    def __init__(self, cupy: Any, index: int) -> None:
        """Use device `index` of this CuPy."""
        self.cupy = cupy
        self.index = index
        self.lost: DataLossError | None = None
        self._reclaim: Callable[[], None] = lambda: None
        self._tell_lost: Callable[[DataLossError], None] = lambda _: None
        self._losing = threading.Lock()
        with self.current():
            self.up, self.compute, self.down = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))
            self._copy = cupy.cuda.runtime.memcpyAsync
            self.multiprocessors: int = cupy.cuda.Device(index).attributes["MultiProcessorCount"]

    def current(self) -> contextlib.AbstractContextManager[object]:
        """Make the device current in this thread, which it stays; every call of CUDA is made inside such a block.

        Threads that call an engine are the server's own, so the device before is not restored. CuPy's context manager
        restores it by `setDevice(0)`, which makes a context on the first GPU.

        Raises:
            DataLossError: the device is lost, or a call in the block found it lost.
        """
        return self

    def copy_up(self, target: int, source: int, nbytes: int) -> None:
        """Ask the stream `up` to copy pinned memory to the device, both by their addresses.

        Copies are asked of the runtime itself: CuPy's methods of memory also ask whether the stream is captured.
        """
        if nbytes:
            self._copy(target, source, nbytes, _TO_DEVICE, self.up.ptr)

    def copy_down(self, target: int, source: int, nbytes: int) -> None:
        """Ask the stream `down` to copy memory of the device to pinned memory."""
        if nbytes:
            self._copy(target, source, nbytes, _TO_HOST, self.down.ptr)

    def copy_across(self, target: int, source: int, nbytes: int) -> None:
        """Ask the stream `compute` to copy memory of the device."""
        if nbytes:
            self._copy(target, source, nbytes, _ON_DEVICE, self.compute.ptr)

    def __enter__(self) -> CudaDevice:
        """See `current`; one object serves all threads."""
        if self.lost is not None:
            raise self.lost_again()
        runtime = self.cupy.cuda.runtime
        if runtime.getDevice() != self.index:
            runtime.setDevice(self.index)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Examine the error of the block."""
        if error is not None:
            self.examine(error)

    def bind(self) -> None:
        """Make the context of a current device this thread's own, for a call of the driver.

        The runtime binds it with its first call. `getDevice` is none, and the first device needs no `setDevice`.
        """
        self.cupy.cuda.runtime.free(0)

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
        """Return the bytes of the device's memory that are free now; see `memory`."""
        return self.memory()[0]

    def memory(self) -> tuple[int, int]:
        """Return the bytes of the device's memory that are free now, and all.

        CuPy holds the interpreter's lock during this call, so no step makes it.
        """
        with self.current():
            free, total = self.cupy.cuda.runtime.memGetInfo()
        return free, total

    def on_shortage(self, reclaim: Callable[[], None]) -> None:
        """Call `reclaim` when memory runs out, before giving up."""
        self._reclaim = reclaim

    def on_lost(self, tell: Callable[[DataLossError], None]) -> None:
        """Call `tell` once the device is lost, in the thread that finds out; at once if it is lost already."""
        with self._losing:
            self._tell_lost, lost = tell, self.lost
        if lost is not None:
            tell(lost)

    def examine(self, error: BaseException) -> None:
        """Raise the loss of the device where an error means it; other errors pass.

        Raises:
            DataLossError: the status is one after which every call fails. All memory of the device is lost.
        """
        if (cause := _FATAL.get(self._status(error))) is None:
            return
        with self._losing:
            first = self.lost is None
            if first:
                self.lost = DataLossError(
                    f"{self.name} failed: {cause} ({error}); its sessions are lost, and the server ends. Create the "
                    "session anew from the last good parameters",
                    reason=Reason.DEVICE_LOST,
                    metadata={"device": self.name, "status": self._status(error)},
                )
            tell, lost = self._tell_lost, self.lost
        assert lost is not None
        if first:
            tell(lost)
        raise self.lost_again() from error

    def wait(self, event: Any) -> None:
        """Wait until the device has reached an event: a moment awake, and then asleep.

        Raises:
            DataLossError: the device is lost.
        """
        with self.current():
            if event.done:
                return
            latest = time.perf_counter() + _SPIN_SECONDS
            while not event.done:
                if time.perf_counter() > latest:
                    event.synchronize()
                    return

    def settle(self, stream: Any) -> None:
        """Wait until a stream has carried out all that it was asked for.

        Raises:
            DataLossError: the device is lost.
        """
        event = self.event()
        with self.current():
            event.record(stream)
        self.wait(event)

    def with_memory(self, call: Callable[[], Returned], nbytes: int) -> Returned:
        """Make a call that needs memory of the device; if there is none, reclaim, and call again.

        Args:
            call: an allocation, the load of a module, or the launch of a kernel, which needs memory for its stack.
            nbytes: the bytes, for the error; 0 if unknown.

        Raises:
            ResourceExhaustedError: there is no memory left.
        """
        try:
            return call()
        except Exception as problem:  # CuPy has no common base for the errors of the runtime and of the driver
            if not self.is_shortage(problem):
                raise
        self._reclaim()
        try:
            return call()
        except Exception as problem:
            if not self.is_shortage(problem):
                raise
            needed = f"for {nbytes} bytes" if nbytes else "for a kernel"
            raise ResourceExhaustedError(
                f"no memory on {self.name} ({self.description}) {needed}; {self.free_bytes()} are free; "
                "close a session or use another device",
                metadata={"needed_bytes": nbytes, "device": self.name},
            ) from problem

    def is_shortage(self, problem: BaseException) -> bool:
        """Tell whether an error of the runtime or of the driver says that there is no memory."""
        return self._status(problem) == _OUT_OF_MEMORY

    def allocate(self, nbytes: int) -> Any:
        """Return fresh device memory, `(nbytes,) uint8`, uninitialised; it is freed with its last reference.

        Raises:
            ResourceExhaustedError: there is none left.
        """
        with self.current():
            return self.with_memory(lambda: self._allocate(nbytes), nbytes)

    def pinned(self, nbytes: int) -> HostArray:
        """Return host memory that the device copies from and to by itself, `(nbytes,) uint8`.

        Kernels may write to it too, at the address that it has on the host.
        """
        with self.current():
            memory = self.cupy.cuda.PinnedMemory(nbytes, _MAPPED)
            pointer = self.cupy.cuda.PinnedMemoryPointer(memory, 0)
        array: HostArray = np.frombuffer(pointer, np.uint8, nbytes)
        return array

    def event(self) -> Any:
        """Return a new event, whose `synchronize` sleeps instead of spinning."""
        with self.current():
            return self.cupy.cuda.Event(block=True, disable_timing=True)

    def view(self, memory: Any, offset: int, count: int, dtype: Any) -> Any:
        """View `count` elements from byte `offset` of some memory on."""
        return self.cupy.ndarray(count, dtype, memory.data + offset)

    def to_host(self, address: int, nbytes: int) -> bytes:
        """Copy memory of the device to the host, behind all that the kernels' stream was asked for."""
        copied = np.empty(nbytes, np.uint8)
        runtime = self.cupy.cuda.runtime
        self.settle(self.compute)
        with self.current():
            runtime.memcpy(address_of(copied), address, nbytes, runtime.memcpyDeviceToHost)
        return copied.tobytes()

    def zero(self, memory: Any) -> None:
        """Fill with zeros, in the order of the kernels."""
        with self.current():
            memory.data.memset_async(0, memory.nbytes, self.compute)

    def _allocate(self, nbytes: int) -> Any:
        memory = self.cupy.cuda.Memory(max(nbytes, 1))
        return self.cupy.ndarray(nbytes, np.uint8, self.cupy.cuda.MemoryPointer(memory, 0))

    def _status(self, error: BaseException) -> int:
        """Return CUDA's status of an error of CuPy's; 0 for any other error."""
        kinds = (self.cupy.cuda.runtime.CUDARuntimeError, self.cupy.cuda.driver.CUDADriverError)
        return int(error.status) if isinstance(error, kinds) else 0

    def lost_again(self) -> DataLossError:
        """Return the loss as an error of its own: one that is raised twice would gather traces."""
        assert self.lost is not None
        return DataLossError(str(self.lost), reason=Reason.DEVICE_LOST, metadata=self.lost.metadata)


def round_up(nbytes: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def address_of(array: HostArray) -> int:
    """Return the address of an array of the host."""
    address: int = array.ctypes.data
    return address
