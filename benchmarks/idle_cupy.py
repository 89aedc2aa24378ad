"""A CuPy that does nothing, for the time that the engine's own Python takes: no device, no driver, no arithmetic."""

from __future__ import annotations

import types
from typing import Any

import numpy as np

__all__ = ["IdleCupy"]

_DEVICE_ADDRESS = 1 << 40


class _Error(RuntimeError):
    status = 0


class _Memory:
    __slots__ = ("ptr", "size")

    def __init__(self, size: int) -> None:
        self.ptr, self.size = _DEVICE_ADDRESS, size


class _MemoryPointer:
    __slots__ = ("mem", "ptr")

    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset

    def __add__(self, offset: int) -> _MemoryPointer:
        moved = _MemoryPointer.__new__(_MemoryPointer)
        moved.mem, moved.ptr = self.mem, self.ptr + offset
        return moved

    def copy_from_host_async(self, mem: int, size: int, stream: Any = None) -> None: ...

    def copy_to_host_async(self, mem: int, size: int, stream: Any = None) -> None: ...

    def copy_from_device_async(self, src: Any, size: int, stream: Any = None) -> None: ...

    def memset_async(self, value: int, size: int, stream: Any = None) -> None: ...


class _PinnedMemory:
    def __init__(self, size: int, flags: int = 0) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self.ptr, self.size = self.bytes.ctypes.data, size


class _Stream:
    ptr = 1

    def __init__(self, non_blocking: bool = False) -> None: ...

    def synchronize(self) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Event:
    done = True

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


class _Device:
    compute_capability = "90"

    def __init__(self, index: int) -> None:
        self.attributes = {"MultiProcessorCount": 132}

    def synchronize(self) -> None: ...


class _Array:
    """As `cupy.ndarray`, of which slices and views are objects of their own."""

    __slots__ = ("data", "dtype", "nbytes", "size")

    def __init__(self, shape: int, dtype: Any, memptr: Any) -> None:
        self.size, self.dtype, self.data = shape, np.dtype(dtype), memptr
        self.nbytes = shape * self.dtype.itemsize

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: slice) -> _Array:
        begin, end, _ = key.indices(self.size)
        return _Array(max(end - begin, 0), self.dtype, self.data + begin * self.dtype.itemsize)

    def view(self, dtype: Any) -> _Array:
        return _Array(self.nbytes // np.dtype(dtype).itemsize, dtype, self.data)


class _Function:
    ptr = 1

    def __call__(self, grid: Any, block: Any, args: Any, shared_mem: int = 0, stream: Any = None) -> None: ...


class _Module:
    def load(self, cubin: bytes) -> None: ...

    def get_function(self, name: str) -> _Function:
        return _Function()


def _nothing(*_: Any) -> None: ...


class IdleCupy:
    """The parts of CuPy that the engine uses; sums are zeros, and parameters stay as they are."""

    __version__ = "idle"

    def __init__(self) -> None:
        """Pretend one device."""
        self.ndarray = _Array
        self.cuda = types.SimpleNamespace(
            Memory=_Memory,
            MemoryPointer=_MemoryPointer,
            PinnedMemory=_PinnedMemory,
            PinnedMemoryPointer=lambda memory, offset: memory.bytes[offset:],
            Stream=_Stream,
            Event=_Event,
            Device=_Device,
            Module=_Module,
            get_elapsed_time=lambda begin, end: 0.0,
            compiler=types.SimpleNamespace(compile_using_nvrtc=lambda *_, **__: (b"nothing", None)),
            driver=types.SimpleNamespace(
                CUDADriverError=_Error, occupancyMaxActiveBlocksPerMultiprocessor=lambda *_: 4
            ),
            runtime=types.SimpleNamespace(
                CUDARuntimeError=_Error,
                runtimeGetVersion=lambda: 13020,
                getDevice=lambda: 0,
                setDevice=_nothing,
                free=_nothing,
                getDeviceProperties=lambda index: {"name": b"nothing"},
                memGetInfo=lambda: (140 << 30, 141 << 30),
                hostRegister=_nothing,
                hostUnregister=_nothing,
                memcpyAsync=_nothing,
            ),
        )
