"""What the classes and functions of the stand-in for CuPy do: calls of CUDA, over a simulated device.

The driver asserts more than CuPy does, as CUDA itself. Every call needs a current device, asynchronous copies need
pinned memory, and addresses must lie in memory that lives.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import re
import struct
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support import cuda_shim
from tests.support.fake_cupy import classes
from tests.support.fake_cupy import device as simulated

CLASSES = (
    "Memory",
    "MemoryPointer",
    "Module",
    "Function",
    "PinnedMemory",
    "PinnedMemoryPointer",
    "Stream",
    "Event",
    "Device",
)
DEVICE_MEMORY, PINNED_MEMORY, REGISTERED_MEMORY = "device memory", "pinned memory", "registered memory"
MAPPED = 2  # a flag of pinned memory that kernels may touch at its own address


class Driver:
    """Devices, their streams and memory. Thread-safe; the current device and stream are a matter of the thread."""

    def __init__(
        self,
        directory: pathlib.Path,
        device_count: int,
        memory_bytes: int,
        library: Any,
        order: str | tuple[str, int],
        processors: int,
        capability: str,
    ) -> None:
        """See `fake_cupy.FakeCupy`."""
        self._directory, self.device_count, self._library = directory, device_count, library
        self.processors, self.capability = processors, capability
        self.lock = threading.RLock()
        self.streams = simulated.Streams(order)
        self.memories = simulated.Memories(self.lock, self.streams, memory_bytes)
        self.failures = simulated.Failures()
        self._current = threading.local()
        self.contexts: set[int] = set()
        self.spinning_waits = 0
        self.resident_blocks = 1
        self.context_bytes = 0
        self.named_streams: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.classes = types.SimpleNamespace(**{name: self.bind(getattr(classes, name)) for name in CLASSES})
        self._null = [self._null_stream(index) for index in range(device_count)]
        self.contexts.clear()

    def bind(self, unbound: type[Any]) -> type[Any]:
        """Make a class of the stand-in one of this driver's."""
        return type(unbound.__name__, (unbound,), {"_driver": self, "__slots__": ()})

    # --- what is current in the thread

    def current_device(self) -> int:
        """Return the current device; the first, where the thread has not set any. No context is made yet."""
        return self._current.__dict__.setdefault("device", 0)

    def bound_device(self) -> int | None:
        """Return the device whose context the driver has for this thread; None before the runtime has bound one."""
        found: int | None = self._current.__dict__.get("bound")
        return found

    def set_device(self, device: int) -> None:
        """Make a device current in this thread, which makes a context on it."""
        if not 0 <= device < self.device_count:
            raise classes.CUDARuntimeError(101)
        self._current.device = self._current.bound = device
        self.contexts.add(device)

    def stack_of_streams(self, device: int) -> list[Any]:
        return self._current.__dict__.setdefault("streams", {}).setdefault(device, [])

    def device(self) -> int:
        device: int | None = self._current.__dict__.get("device")
        assert device is not None, "no device is current in this thread"
        self._current.bound = device
        self.contexts.add(device)
        return device

    def stream(self) -> Any:
        stack = self.stack_of_streams(self.device())
        return stack[-1] if stack else self._null[self.device()]

    def queue_of(self, stream: Any) -> Any:
        stream = stream or self.stream()
        assert stream._device == self.device(), f"the stream is of device {stream._device}, not {self.device()}"
        return stream._queue

    def here(self, ptr: int, size: int) -> Any:
        """Find the memory of the current device that holds these bytes."""
        return self.memories.on_device(self.device(), ptr, size)

    # --- devices

    def count_devices(self) -> int:
        if not self.device_count:
            raise classes.CUDARuntimeError(100)
        return self.device_count

    def properties(self, device: int) -> dict[str, Any]:
        if not 0 <= device < self.device_count:
            raise classes.CUDARuntimeError(101)
        major, minor = map(int, self.capability)
        return {
            "name": b"Pretended GPU",
            "major": major,
            "minor": minor,
            "multiProcessorCount": self.processors,
            "totalGlobalMem": self.memories.memory_bytes,
        }

    def synchronize(self, device: int) -> None:
        with self.lock:
            self.failures.meet("synchronize")
            for mark in [self.streams.mark(queue) for queue in self.streams.of_device(device)]:
                self.streams.complete(mark)

    # --- memory

    def pin(self, size: int, flags: int) -> Any:
        self.device()
        self.failures.meet("PinnedMemory")
        pinned = simulated.Range.allocate(PINNED_MEMORY, None, size)
        pinned.mapped = bool(flags & MAPPED)
        return self.memories.add(pinned)

    def malloc(self, size: int) -> Any:
        device = self.device()
        self.failures.meet("malloc")
        with self.lock:
            if size > self.memory_of(device)[0]:
                raise classes.CUDARuntimeError(2)
            self.memories.allocations += 1
            return self.memories.add(simulated.Range.allocate(DEVICE_MEMORY, device, size))

    def memory_of(self, device: int) -> tuple[int, int]:
        """Return what is free, and the whole."""
        total, context_bytes = self.memories.memory_bytes, self.context_bytes if device in self.contexts else 0
        return total - context_bytes - self.memories.used_bytes(DEVICE_MEMORY, device), total

    def register(self, ptr: int, size: int, flags: int) -> None:
        self.device()
        self.failures.meet("hostRegister")
        with self.lock:
            if ptr == 0 or size == 0:
                raise classes.CUDARuntimeError(1)
            if self.memories.overlapping(ptr, size):
                raise classes.CUDARuntimeError(712)
            self.memories.add(simulated.Range(REGISTERED_MEMORY, None, ptr, size))

    def unregister(self, ptr: int) -> None:
        self.device()
        with self.lock:
            starts = {known.start: known for known in self.memories.ranges if known.kind == REGISTERED_MEMORY}
            if ptr not in starts:
                raise classes.CUDARuntimeError(713)
            self.memories.free(starts[ptr])

    def free(self, ptr: int) -> None:
        """Bind the context, which is all that freeing nothing does; memory is freed by its object."""
        assert ptr == 0
        self.device()

    def share(self, ptr: int) -> bytes:
        assert self.bound_device() is not None, "the driver has no context for this thread"
        self.failures.meet("ipcGetMemHandle")
        shared = self.here(ptr, 1)
        return struct.pack("<QQQ", shared.start, shared.size, shared.device).ljust(64, b"\0")

    # --- work

    def copy(
        self,
        label: str,
        to: int,
        origin: int,
        size: int,
        stream: Any,
        find_to: Callable[[int, int], Any],
        find_origin: Callable[[int, int], Any],
    ) -> None:
        assert type(to) is int and type(origin) is int, "an address is an int"
        with self.lock:
            queue = self.queue_of(stream)
            self.failures.meet("copy")
            if size:
                ranges = [find_to(to, size), find_origin(origin, size)]
                work = functools.partial(ctypes.memmove, to, origin, size)
                self._submit(queue, f"{label} of {size} bytes", ranges, work)

    def copy_in_stream(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        """Copy as the classes of memory do, by addresses; the kind is the direction."""
        host, here = self.memories.on_host, self.here
        label, to, origin = {1: ("upload", here, host), 2: ("download", host, here), 3: ("copy", here, here)}[kind]
        self.copy(label, dst, src, size, self.named_streams[stream], to, origin)

    def fill(self, ptr: int, value: int, size: int, stream: Any) -> None:
        with self.lock:
            queue = self.queue_of(stream)
            self.failures.meet("memset")
            if size:
                work = functools.partial(ctypes.memset, ptr, value, size)
                self._submit(queue, f"memset of {size} bytes", [self.here(ptr, size)], work)

    def copy_at_once(self, dst: int, src: int, size: int, kind: int) -> None:
        """Copy as the null stream does, of any host memory, and wait for it; other streams go on."""
        with self.lock:
            self.failures.meet("copy")
            ranges = [self.here(dst if kind == 1 else src, size)]
            work = functools.partial(ctypes.memmove, dst, src, size)
            queue = self._null[self.device()]._queue
            self._submit(queue, f"synchronous copy of {size} bytes", ranges, work)
            self.streams.complete(self.streams.mark(queue))

    def _submit(self, queue: Any, label: str, ranges: list[Any], work: Callable[[], None]) -> None:
        self.streams.submit(queue, simulated.Operation(label, ranges, work))

    # --- kernels

    def load(self, cubin: bytes) -> str:
        """Read machine code, which has to be of the current device's architecture."""
        self.device()
        self.failures.meet("Module")
        header, _, source = cubin.decode(errors="replace").partition("\n")
        if not header.startswith("fake cubin sm_"):
            raise classes.CUDADriverError(200)
        if header != f"fake cubin sm_{self.capability}":
            raise classes.CUDADriverError(209)
        return source

    def occupancy(self, func: int, block_size: int, shared_bytes: int) -> int:
        self.device()
        assert block_size > 0 and not shared_bytes
        return self.resident_blocks

    def kernel(self, source: str, name: str) -> Callable[..., None]:
        """Find a kernel in machine code, for the current device."""
        library = self._library
        if library is None or name not in library.names:
            library = cuda_shim.Library(source, self._directory)
        if name not in library.names:
            raise classes.CUDADriverError(500)
        return functools.partial(self._launch, library, name, _parameters(source, name), self.device())

    def _launch(
        self,
        library: Any,
        name: str,
        parameters: list[str],
        device: int,
        grid: tuple[int],
        block: tuple[int],
        args: Any,
        stream: Any,
    ) -> None:
        assert self.device() == device, f"{name} was loaded on device {device}"
        assert isinstance(args, tuple), f"the arguments of {name} are no tuple"
        assert len(grid) == len(block) == 1 and grid[0] >= 1 and 1 <= block[0] <= 1024
        with self.lock:
            queue = self.queue_of(stream)
            self.failures.meet("kernel")
            declared = parameters or [""] * len(args)
            unpacked = [self._argument(name, *each) for each in zip(declared, args, strict=True)]
            ranges = [touched for _, touched in unpacked if touched is not None]
            values = tuple(value for value, _ in unpacked)
            work = functools.partial(library.launch, name, grid[0], block[0], values)
            self._submit(queue, f"kernel {name}", ranges, work)

    def _argument(self, name: str, parameter: str, arg: Any) -> tuple[Any, Any]:
        """Return an argument of the compiled kernel, and the memory that it refers to."""
        if isinstance(arg, classes.ndarray):
            return self._array(name, arg)
        if "*" in parameter:
            assert type(arg) in (int, np.uint64), f"{type(arg)} is no address, for {parameter!r} of {name}"
            touched = self._touched(int(arg))  # how much the kernel touches there nobody says
            return touched.bytes_at(int(arg), touched.start + touched.size - int(arg)), touched
        assert isinstance(arg, int | np.int64 | np.uint32 | np.float32), f"{type(arg)} is no argument of {name}"
        kind = np.int64 if isinstance(arg, int) else type(arg)
        declared = {"long long": np.int64, "unsigned int": np.uint32, "float": np.float32}
        assert declared.get(parameter.rpartition(" ")[0], kind) is kind, f"{type(arg)} for {parameter!r} of {name}"
        return kind(arg), None

    def _array(self, name: str, array: Any) -> tuple[Any, Any]:
        if not array.size:
            return np.empty(0, np.uint8), None
        assert array.data.ptr % array.dtype.itemsize == 0, f"an array of {array.dtype} for {name} is not aligned"
        touched = self.here(array.data.ptr, array.nbytes)
        return touched.bytes_at(array.data.ptr, array.nbytes), touched

    def _touched(self, address: int) -> Any:
        """Find memory that kernels may touch: of the device, or pinned and mapped."""
        pinned = self.memories.find(address, 1)
        return pinned if pinned is not None and pinned.mapped else self.here(address, 1)

    def _null_stream(self, index: int) -> Any:
        self._current.device = index
        stream = self.classes.Stream(non_blocking=True)
        del self._current.device
        stream.ptr = 0
        return stream


def _parameters(source: str, name: str) -> list[str]:
    """Return the declarations of a kernel's parameters; none of a kernel that the source does not have."""
    found = re.search(rf'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?{name}\(([^)]*)\)', source)
    return [] if found is None else [parameter.strip() for parameter in found[1].split(",") if parameter]
