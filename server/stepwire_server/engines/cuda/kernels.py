"""Compiled kernels of one GPU, made when first asked for, and how they are launched. Unverified on a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from stepwire.errors import DataLossError
from stepwire_server.engines.cuda.compiler import Compiler
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.cuda.source import (
    THREADS,
    Kernel,
    block_kernels,
    gradient_kernels,
    measure_kernel,
    module_source,
    update_kernel,
)
from stepwire_server.engines.payloads import name_of
from stepwire_server.engines.protocol import GRAIN
from stepwire_server.rules import Precision, Recipe

__all__ = ["LANE_ELEMENTS", "CudaKernels", "grains", "head_of", "launch"]

LANE_ELEMENTS: Final = 4
"""The elements that a thread loads at a time: 16 bytes of float32."""

# Kernels stride over the rest, and these are enough blocks to fill any GPU several times. Kernels that measure leave a
# sum a block, which travels to the host, so they have fewer. Kernels of 8 bits copy their tables first, so they have as
# many blocks as run at a time.
_BLOCKS_A_MULTIPROCESSOR: Final = 64
_BLOCKS_OF_EIGHT_BITS_A_MULTIPROCESSOR: Final = 3
_MOST_MEASURING_BLOCKS: Final = 2048
_ELEMENTS_OF_A_WARP: Final = 256
_BLOCK_ELEMENTS: Final = THREADS * LANE_ELEMENTS


class _Kernel:
    """A kernel of a module; a launch that finds no memory for its stack is repeated once memory is reclaimed."""

    __slots__ = ("_device", "_function")

    def __init__(self, function: Any, device: CudaDevice) -> None:
        self._function, self._device = function, device

    def __call__(self, blocks: tuple[int], threads: tuple[int], arguments: tuple[Any, ...]) -> None:
        self._device.with_memory(lambda: self._function(blocks, threads, arguments), 0)


class CudaKernels:
    """The kernels of one device. Thread-safe."""

    def __init__(self, device: CudaDevice, compiler: Compiler) -> None:
        """Compile with `compiler` for `device`."""
        self._compiler = compiler
        self._device = device
        self._functions: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._lock = threading.Lock()

    def update(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Any:
        """Return the fused kernel; `update_kernel` documents its arguments."""
        names = (name_of(gradient), reply.name if reply is not None else None)
        return self._only((*recipe.key, gradient, reply), lambda: [update_kernel(recipe, *names)])

    def measure(self, recipe: Recipe, gradient: np.dtype[Any]) -> Any:
        """Return the kernel that squares parameters and direction; `measure_kernel` documents its arguments."""
        return self._only(("measure", *recipe.key, gradient), lambda: [measure_kernel(recipe, name_of(gradient))])

    def of_gradients(self, name: str) -> Any:
        """Return a kernel by its name in `gradient_kernels`, which documents them."""
        return self._module(("gradients",), gradient_kernels)[name]

    def of_blocks(self, name: str) -> Any:
        """Return a kernel by its name in `block_kernels`, which documents them."""
        return self._module(("blocks",), block_kernels)[name]

    def blocks(self, size: int) -> int:
        """Return the blocks of threads for some elements, at least one."""
        return max(
            min(-(-size // (THREADS * LANE_ELEMENTS)), _BLOCKS_A_MULTIPROCESSOR * self._device.multiprocessors), 1
        )

    def blocks_of_eight_bits(self, size: int) -> int:
        """Return the blocks of threads for some elements of which 256 are a warp's, at least one."""
        warps = -(-size // _ELEMENTS_OF_A_WARP)
        most = _BLOCKS_OF_EIGHT_BITS_A_MULTIPROCESSOR * self._device.multiprocessors
        return max(min(-(-warps * 32 // THREADS), most), 1)

    def blocks_of(self, recipe: Recipe, size: int) -> int:
        """Return the blocks of threads for a recipe's pass over some elements."""
        blocks = self.blocks_of_eight_bits(size) if recipe.precision is Precision.INT8 else self.blocks(size)
        return min(blocks, _MOST_MEASURING_BLOCKS) if recipe.measures else blocks

    def close(self) -> None:
        """Forget the kernels; their modules are unloaded from the device that is current."""
        with contextlib.suppress(DataLossError), self._device.current():
            self._functions = {}

    def _only(self, key: tuple[Any, ...], write: Callable[[], list[Kernel]]) -> Any:
        (function,) = self._module(key, write).values()
        return function

    def _module(self, key: tuple[Any, ...], write: Callable[[], list[Kernel]]) -> dict[str, Any]:
        return self._functions.get(key) or self._compile(key, write)

    def _compile(self, key: tuple[Any, ...], write: Callable[[], list[Kernel]]) -> dict[str, Any]:
        with self._lock, self._device.current():
            if key not in self._functions:
                kernels = write()
                module = self._compiler.load(kernels[0].name, module_source(kernels))
                self._functions[key] = {
                    kernel.name: _Kernel(module.get_function(kernel.name), self._device) for kernel in kernels
                }
            return self._functions[key]


def launch(kernel: Any, blocks: int, *arguments: Any) -> None:
    """Run a kernel on the current device and stream."""
    kernel((blocks,), (THREADS,), arguments)


def grains(size: int) -> int:
    """Count the blocks of elements whose squares are summed by themselves."""
    return -(-size // GRAIN)


def head_of(arrays: Sequence[Any], size: int) -> int:
    """Return how many elements come before the first that starts a vector in all arrays; `size` if none does."""
    places = {array.data.ptr // array.dtype.itemsize % LANE_ELEMENTS for array in arrays}
    (place,) = places if len(places) == 1 else (None,)
    return size if place is None else min(-place % LANE_ELEMENTS, size)
