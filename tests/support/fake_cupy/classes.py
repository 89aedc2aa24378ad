"""The classes of the stand-in for CuPy. `fake_cupy` makes a set of them for each stand-in, over its `_driver`.

A class has the attributes and the parameters of CuPy's that the engine may use; `test_real_cupy` compares them.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

MESSAGES = {
    1: "cudaErrorInvalidValue: invalid argument",
    2: "cudaErrorMemoryAllocation: out of memory",
    35: "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
    98: "cudaErrorInvalidDeviceFunction: invalid device function",
    100: "cudaErrorNoDevice: no CUDA-capable device is detected",
    101: "cudaErrorInvalidDevice: invalid device ordinal",
    700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
    712: "cudaErrorHostMemoryAlreadyRegistered: part or all of the requested memory range is already mapped",
    713: "cudaErrorHostMemoryNotRegistered: pointer does not correspond to a registered memory region",
    716: "cudaErrorMisalignedAddress: misaligned address",
    719: "cudaErrorLaunchFailure: unspecified launch failure",
    801: "cudaErrorNotSupported: operation not supported",
}


DRIVER_MESSAGES = {
    2: "CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    200: "CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid",
    209: "CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available for execution on the device",
    500: "CUDA_ERROR_NOT_FOUND: named symbol not found",
    700: "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered",
}


class CUDARuntimeError(RuntimeError):
    """As `cupy.cuda.runtime.CUDARuntimeError`."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(MESSAGES[status])


class CUDADriverError(RuntimeError):
    """As `cupy.cuda.driver.CUDADriverError`."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(DRIVER_MESSAGES[status])


class Memory:
    """As `cupy.cuda.Memory`; like that it has no weak references."""

    __slots__ = ("_range", "ptr", "size")
    _driver: Any

    def __init__(self, size: int) -> None:
        self.ptr, self.size, self._range = 0, size, None
        if size:
            self._range = self._driver.malloc(size)
            self.ptr = self._range.start

    def __del__(self) -> None:
        if self._range is not None:
            self._driver.memories.free(self._range)


class MemoryPointer:
    """As `cupy.cuda.MemoryPointer`."""

    __slots__ = ("mem", "ptr")
    _driver: Any

    def __init__(self, mem: Memory, offset: int) -> None:
        assert mem.ptr or not offset
        self.mem, self.ptr = mem, mem.ptr + offset

    def __add__(self, offset: int) -> MemoryPointer:
        return type(self)(self.mem, self.ptr - self.mem.ptr + offset)

    def copy_from_host_async(self, mem: int, size: int, stream: Stream | None = None) -> None:
        self._driver.copy("upload", self.ptr, mem, size, stream, self._driver.here, self._driver.memories.on_host)

    def copy_to_host_async(self, mem: int, size: int, stream: Stream | None = None) -> None:
        self._driver.copy("download", mem, self.ptr, size, stream, self._driver.memories.on_host, self._driver.here)

    def copy_from_device_async(self, src: MemoryPointer, size: int, stream: Stream | None = None) -> None:
        self._driver.copy("copy", self.ptr, src.ptr, size, stream, self._driver.here, self._driver.here)

    def memset_async(self, value: int, size: int, stream: Stream | None = None) -> None:
        self._driver.fill(self.ptr, value, size, stream)


class PinnedMemory:
    """As `cupy.cuda.PinnedMemory`."""

    _driver: Any

    def __init__(self, size: int, flags: int = 0) -> None:
        self.ptr, self.size, self._range = 0, size, None
        if size:
            self._range = self._driver.pin(size, flags)
            self.ptr = self._range.start

    def __del__(self) -> None:
        if self._range is not None:
            self._driver.memories.free(self._range)


class PinnedMemoryPointer:
    """As `cupy.cuda.PinnedMemoryPointer`: a buffer over the rest of the memory, which it keeps.

    Python has no way to write such a class before 3.12, so its instances are arrays of ctypes.
    """

    def __new__(cls, mem: PinnedMemory, offset: int) -> Any:
        pointer = _buffer_class(mem.size - offset).from_address(mem.ptr + offset)
        pointer.mem, pointer.ptr = mem, mem.ptr + offset
        return pointer


@functools.cache
def _buffer_class(size: int) -> type[Any]:
    return type("PinnedMemoryPointer", (ctypes.c_ubyte * size,), {})


class Stream:
    """As `cupy.cuda.Stream`; only the kind that does not wait for the null stream."""

    _driver: Any

    def __init__(self, *, non_blocking: bool = False) -> None:
        assert non_blocking, "a stream that blocks the null stream is not simulated"
        self._device = self._driver.device()
        with self._driver.lock:
            self._queue = self._driver.streams.open(self._device)
        self.ptr = id(self._queue)
        self._driver.named_streams[self.ptr] = self

    def synchronize(self) -> None:
        with self._driver.lock:
            queue = self._driver.queue_of(self)
            self._driver.spinning_waits += 1
            self._driver.failures.meet("synchronize")
            self._driver.streams.complete(self._driver.streams.mark(queue))

    def wait_event(self, event: Event) -> None:
        with self._driver.lock:
            queue = self._driver.queue_of(self)
            if mark := event._marked():
                self._driver.streams.wait(queue, mark)

    def record(self, event: Event | None = None) -> Event:
        event = event or self._driver.classes.Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        self._driver.queue_of(self)
        self._driver.stack_of_streams(self._device).append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.stack_of_streams(self._device).pop()

    def __del__(self) -> None:
        if hasattr(self, "_queue"):
            self._queue.closed = True


class Event:
    """As `cupy.cuda.Event`: the last record of it, whichever stream that was on.

    Waiting needs no current device in CUDA. It makes a context on whichever device is current, so here it needs one.
    """

    _driver: Any

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self._blocks = block
        self._device = self._driver.device()
        self._mark: Any = None

    def _marked(self) -> Any:
        """Return the last record, or None."""
        assert self._driver.device() == self._device, f"the event is of device {self._device}"
        return self._mark

    def record(self, stream: Stream | None = None) -> None:
        with self._driver.lock:
            self._marked()
            self._mark = self._driver.streams.mark(self._driver.queue_of(stream))

    def synchronize(self) -> None:
        with self._driver.lock:
            mark = self._marked()
            self._driver.spinning_waits += not self._blocks
            self._driver.failures.meet("synchronize")
            if mark:
                self._driver.streams.complete(mark)

    @property
    def done(self) -> bool:
        with self._driver.lock:
            mark = self._marked()
            return not self._driver.failures.awaits("synchronize") and (mark is None or mark.done)


class Device:
    """As `cupy.cuda.Device`."""

    _driver: Any

    def __init__(self, device: int) -> None:
        self.id = device
        self.compute_capability = self._driver.capability
        self.attributes = {
            "MultiProcessorCount": self._driver.processors,
            "MaxThreadsPerMultiProcessor": 2048,
            "AsyncEngineCount": 3,
            "L2CacheSize": 1 << 20,
        }

    def __enter__(self) -> Device:
        self._before = self._driver.current_device()
        self._driver.set_device(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.set_device(self._before)

    @property
    def mem_info(self) -> tuple[int, int]:
        return self._driver.memory_of(self.id)

    def synchronize(self) -> None:
        self._driver.synchronize(self.id)


class ndarray:
    """As `cupy.ndarray`: one dimension, over memory that is given."""

    def __init__(self, shape: int | tuple[int], dtype: Any = float, memptr: MemoryPointer | None = None) -> None:
        assert memptr is not None, "the engine gives memory to its arrays"
        (self.size,) = shape if isinstance(shape, tuple) else (shape,)
        self.dtype, self.data = np.dtype(dtype), memptr
        self.nbytes = self.size * self.dtype.itemsize
        assert self.size >= 0 and memptr.mem.ptr <= memptr.ptr, "an array begins before its memory"
        assert memptr.ptr + self.nbytes <= memptr.mem.ptr + memptr.mem.size, "an array ends beyond its memory"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: slice) -> ndarray:
        assert isinstance(key, slice) and key.step is None
        assert all(isinstance(end, int | None) and (end or 0) >= 0 for end in (key.start, key.stop))
        begin, end, _ = key.indices(self.size)
        return type(self)(max(end - begin, 0), self.dtype, self.data + begin * self.dtype.itemsize)

    def view(self, dtype: Any) -> ndarray:
        dtype = np.dtype(dtype)
        if self.nbytes % dtype.itemsize:
            raise ValueError("its size must be a divisor of the total size in bytes of the last axis of the array.")
        return type(self)(self.nbytes // dtype.itemsize, dtype, self.data)


class Module:
    """As `cupy.cuda.Module`: machine code on the device that was current when it was loaded."""

    _driver: Any

    def load(self, cubin: bytes) -> None:
        assert type(cubin) is bytes
        self._source = self._driver.load(cubin)
        self._device = self._driver.device()

    def get_function(self, name: str) -> Function:
        return self._driver.classes.Function(self, name)

    def __del__(self) -> None:
        """Unload. The driver's own call wants a context, which a thread has after its first call of the runtime."""
        if hasattr(self, "_device") and self._driver.bound_device() != self._device:
            self._driver.memories.faults.append(f"a module of device {self._device} is unloaded without its context")


class Function:
    """As `cupy.cuda.Function`, which keeps its module."""

    _driver: Any

    def __init__(self, module: Module, funcname: str) -> None:
        self.module = module
        self._launch = self._driver.kernel(module._source, funcname)
        self.ptr = id(self)

    def __call__(
        self,
        grid: tuple[int],
        block: tuple[int],
        args: tuple[Any, ...],
        shared_mem: int = 0,
        stream: Stream | None = None,
        enable_cooperative_groups: bool = False,
    ) -> None:
        assert not shared_mem and not enable_cooperative_groups
        self._launch(grid, block, args, stream)
