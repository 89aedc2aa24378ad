"""One GPU as CuPy gives access to it: compiled kernels and copies. Unverified on a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from stepwire_server.engines.cuda_codecs import THREADS
from stepwire_server.engines.cuda_source import (
    COMPILE_OPTIONS,
    Kernel,
    gradient_kernels,
    measure_kernel,
    module_source,
    update_kernel,
)
from stepwire_server.engines.protocol import Device, HostArray
from stepwire_server.rules import Recipe

__all__ = ["CudaKernels", "blocks_for", "launch"]

# Kernels stride over the rest. Those that measure leave float32 sums for each block, which travel to the host: few
# enough to be quick, and enough for any GPU to be full and for a thread's own sum to stay short.
_MOST_BLOCKS = 65_535
_MOST_MEASURING_BLOCKS = 4096


class CudaKernels:
    """Compiled kernels, made when first asked for, and copies; on one device. Thread-safe. Unverified on a GPU.

    Attributes:
        cupy: the CuPy module, or a stand-in.
    """

    def __init__(self, cupy: Any, index: int) -> None:
        """Use device `index` of this CuPy."""
        self.cupy = cupy
        self._index = index
        self._functions: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._lock = threading.Lock()

    def device(self) -> contextlib.AbstractContextManager[Any]:
        """Make the device current in this thread; CuPy's device objects must not be shared among threads."""
        context: contextlib.AbstractContextManager[Any] = self.cupy.cuda.Device(self._index)
        return context

    def describe(self) -> Device:
        """Name the device and its memory."""
        name = self.cupy.cuda.runtime.getDeviceProperties(self._index)["name"].decode()
        _, memory_bytes = self.cupy.cuda.Device(self._index).mem_info
        return Device(f"cuda:{self._index}", name, memory_bytes)

    def upload(self, values: HostArray) -> Any:
        """Copy to a new device array."""
        with self.device():
            copy = self.cupy.empty(len(values), values.dtype)
            self.overwrite(copy, values)
        return copy

    def overwrite(self, array: Any, values: HostArray) -> None:
        """Copy from the host and wait: some machines copy even pageable memory after the call has returned."""
        with self.device():
            array.set(values)
            self.cupy.cuda.get_current_stream().synchronize()

    def update(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Any:
        """Return the fused kernel; `update_kernel` documents its arguments."""
        key = (*recipe.key, gradient, reply)
        names = (gradient.name, reply.name if reply is not None else None)
        return self._only(key, lambda: [update_kernel(recipe, *names)])

    def measure(self, recipe: Recipe, gradient: np.dtype[Any]) -> Any:
        """Return the kernel that squares parameters and direction; `measure_kernel` documents its arguments."""
        return self._only(("measure", *recipe.key, gradient), lambda: [measure_kernel(recipe, gradient.name)])

    def of_gradients(self, name: str) -> Any:
        """Return a kernel by its name in `gradient_kernels`, which documents them."""
        return self._module(("gradients",), gradient_kernels)[name]

    def close(self) -> None:
        """Forget the kernels, and give memory back."""
        self._functions = {}
        self.free_unused()

    def free_unused(self) -> None:
        """Give memory that no array holds back to the device, for other processes."""
        with self.device():
            self.cupy.get_default_memory_pool().free_all_blocks()

    def _only(self, key: tuple[Any, ...], write: Callable[[], list[Kernel]]) -> Any:
        (function,) = self._module(key, write).values()
        return function

    def _module(self, key: tuple[Any, ...], write: Callable[[], list[Kernel]]) -> dict[str, Any]:
        return self._functions.get(key) or self._compile(key, write)

    def _compile(self, key: tuple[Any, ...], write: Callable[[], list[Kernel]]) -> dict[str, Any]:
        with self._lock, self.device():
            if key not in self._functions:
                kernels = write()
                module = self.cupy.RawModule(code=module_source(kernels), options=COMPILE_OPTIONS)
                module.compile()
                self._functions[key] = {kernel.name: module.get_function(kernel.name) for kernel in kernels}
            return self._functions[key]


def blocks_for(size: int, measures: bool = False) -> int:
    """Return the blocks of threads that `launch` uses for some elements, at least one."""
    return min(-(-size // THREADS), _MOST_MEASURING_BLOCKS if measures else _MOST_BLOCKS)


def launch(kernel: Any, blocks: int, *arguments: Any) -> None:
    """Run a kernel on the current device."""
    kernel((blocks,), (THREADS,), arguments)
