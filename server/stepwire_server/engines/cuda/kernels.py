"""Compiled kernels of one GPU, made when first asked for, and how they are launched. Unverified on a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from stepwire_server.engines.cuda.compiler import Compiler
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.cuda.source import (
    THREADS,
    Kernel,
    block_kernels,
    gather_kernels,
    gradient_kernels,
    measure_kernel,
    module_source,
    table_kernel,
    update_kernel,
)
from stepwire_server.engines.payloads import name_of
from stepwire_server.engines.protocol import GRAIN
from stepwire_server.rules import Precision, Recipe

__all__ = ["LANE_ELEMENTS", "CudaKernel", "CudaKernels", "grains", "head_of"]

LANE_ELEMENTS: Final = 4
"""The elements that a thread loads at a time: 16 bytes of float32."""

# Kernels stride over the rest of their elements. A grid is as many blocks as run at a time, or a multiple of them: the
# blocks of a last wave that is not full would leave most of the device idle. Kernels that measure leave a sum a block,
# which goes to the host, so their waves are fewer. Kernels of 8 bits copy their tables first, so they have one wave.
_WAVES: Final = 16
_WAVES_OF_EIGHT_BITS: Final = 1
_MOST_MEASURING_BLOCKS: Final = 2048
_ELEMENTS_OF_A_WARP: Final = 256
_BLOCK_ELEMENTS: Final = THREADS * LANE_ELEMENTS
_BLOCK: Final = (THREADS,)
_MOST_MODULES: Final = 512


class CudaKernel:
    """A kernel of a module.

    Attributes:
        wave: the number of blocks of threads that the device runs at a time.
    """

    __slots__ = ("_device", "_function", "wave")

    def __init__(self, function: Any, device: CudaDevice) -> None:
        """Launch a function of a module; its registers and its shared memory decide the wave."""
        self._function, self._device = function, device
        resident = device.cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(function.ptr, THREADS, 0)
        self.wave: int = max(resident, 1) * device.multiprocessors

    def launch(self, blocks: int, arguments: tuple[Any, ...]) -> None:
        """Run on the stream `compute`, in a thread whose device is current.

        A launch that finds no memory for its stack is repeated once memory is reclaimed.

        Args:
            blocks: the number of blocks of threads.
            arguments: addresses and 64-bit numbers as `int`, others as NumPy's scalars.
        """
        stream = self._device.compute
        try:
            self._function((blocks,), _BLOCK, arguments, stream=stream)
        except Exception as problem:  # CuPy has no common base for the errors of the runtime and of the driver
            if not self._device.is_shortage(problem):
                raise
            self._device.with_memory(lambda: self._function((blocks,), _BLOCK, arguments, stream=stream), 0)

    def __del__(self) -> None:
        """Let go of the function with its device current: the last one unloads the module, in whichever thread."""
        with contextlib.suppress(Exception), self._device.current():
            self._device.bind()
            self._function = None

    def blocks(self, size: int) -> int:
        """Return the blocks of threads for some elements, at least one."""
        return max(min(-(-size // _BLOCK_ELEMENTS), _WAVES * self.wave), 1)

    def blocks_of_eight_bits(self, size: int) -> int:
        """Return the blocks of threads for some elements of which 256 are a warp's, at least one."""
        warps = -(-size // _ELEMENTS_OF_A_WARP)
        return max(min(-(-warps * 32 // THREADS), _WAVES_OF_EIGHT_BITS * self.wave), 1)

    def blocks_of(self, recipe: Recipe, size: int) -> int:
        """Return the blocks of threads for a recipe's pass over some elements."""
        blocks = self.blocks_of_eight_bits(size) if recipe.precision is Precision.INT8 else self.blocks(size)
        if not recipe.measures:
            return blocks
        return min(blocks, _MOST_MEASURING_BLOCKS // self.wave * self.wave or _MOST_MEASURING_BLOCKS)


class CudaKernels:
    """The kernels of one device. Thread-safe.

    Attributes:
        most: the most modules of recipes; beyond them the least recently used one is unloaded, which gives its memory
            back.
    """

    def __init__(self, device: CudaDevice, compiler: Compiler) -> None:
        """Compile with `compiler` for `device`."""
        self._compiler = compiler
        self._device = device
        self.most = _MOST_MODULES
        self._functions: OrderedDict[tuple[Any, ...], dict[str, CudaKernel]] = OrderedDict()
        self._code_bytes: dict[tuple[Any, ...], int] = {}
        self._sums: dict[tuple[np.dtype[Any], bool], CudaKernel] = {}
        self._lock = threading.Lock()

    @property
    def code_bytes(self) -> int:
        """The machine code on the device."""
        return self._compiler.loaded_bytes

    def update(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> CudaKernel:
        """Return the fused kernel; `update_kernel` documents its arguments."""
        names = (name_of(gradient), reply.name if reply is not None else None)
        return self._only((*recipe.key, gradient, reply), lambda: [update_kernel(recipe, *names)])

    def table(self, recipe: Recipe, reply: np.dtype[Any] | None) -> CudaKernel:
        """Return the kernel that steps rows; `table_kernel` documents its arguments."""
        name = None if reply is None else reply.name
        return self._only(("table", *recipe.key, reply), lambda: [table_kernel(recipe, name)])

    def measure(self, recipe: Recipe, gradient: np.dtype[Any]) -> CudaKernel:
        """Return the kernel that squares parameters and direction; `measure_kernel` documents its arguments."""
        return self._only(("measure", *recipe.key, gradient), lambda: [measure_kernel(recipe, name_of(gradient))])

    def sum(self, gradient: np.dtype[Any], accumulated: bool) -> CudaKernel:
        """Return the kernel that sums the squares of a gradient, or of what it and the accumulated gradient are."""
        key = (gradient, accumulated)
        if (kernel := self._sums.get(key)) is None:
            kernel = self.of_gradients(f"{'sum_accumulated' if accumulated else 'sum'}_{name_of(gradient)}")
            self._sums[key] = kernel
        return kernel

    def of_gradients(self, name: str) -> CudaKernel:
        """Return a kernel by its name in `gradient_kernels`, which documents them."""
        return self._module(("gradients",), gradient_kernels)[name]

    def of_blocks(self, name: str) -> CudaKernel:
        """Return a kernel by its name in `block_kernels`, which documents them."""
        return self._module(("blocks",), block_kernels)[name]

    def of_tables(self, name: str) -> CudaKernel:
        """Return a kernel by its name in `gather_kernels`, which documents them."""
        return self._module(("tables",), gather_kernels)[name]

    def close(self) -> None:
        """Forget the kernels; a module is unloaded with the last of its kernels."""
        self._functions, self._sums = OrderedDict(), {}

    def _only(self, key: tuple[Any, ...], write: Callable[[], list[Kernel]]) -> CudaKernel:
        (function,) = self._module(key, write).values()
        return function

    def _module(self, key: tuple[Any, ...], write: Callable[[], list[Kernel]]) -> dict[str, CudaKernel]:
        try:
            self._functions.move_to_end(key)
            return self._functions[key]
        except KeyError:
            return self._compile(key, write)

    def _compile(self, key: tuple[Any, ...], write: Callable[[], list[Kernel]]) -> dict[str, CudaKernel]:
        with self._lock, self._device.current():
            if (found := self._functions.get(key)) is not None:
                return found
            self._make_room()
            kernels, before = write(), self._compiler.loaded_bytes
            module = self._compiler.load(kernels[0].name, module_source(kernels))
            made = {kernel.name: CudaKernel(module.get_function(kernel.name), self._device) for kernel in kernels}
            self._functions[key] = made
            self._code_bytes[key] = self._compiler.loaded_bytes - before
            return made

    def _make_room(self) -> None:
        """Forget the least recently used recipes' modules beyond the bound; launches of them are over first."""
        recipes = [key for key in self._functions if len(key) > 1]
        if len(recipes) < self.most:
            return
        self._device.settle(self._device.compute)
        for key in recipes[: len(recipes) - self.most + 1]:
            self._functions.pop(key, None)
            self._compiler.loaded_bytes -= self._code_bytes.pop(key, 0)


def grains(size: int) -> int:
    """Count the blocks of elements whose squares are summed by themselves."""
    return -(-size // GRAIN)


def head_of(addresses: Sequence[int], itemsizes: Sequence[int], size: int) -> int:
    """Return how many elements come before the first that starts a vector in all arrays; `size` if none does.

    Args:
        addresses: the address of the first element in each array.
        itemsizes: the bytes of an element in each array.
        size: the number of elements.
    """
    place = addresses[0] // itemsizes[0] % LANE_ELEMENTS
    for address, itemsize in zip(addresses, itemsizes, strict=True):
        if address // itemsize % LANE_ELEMENTS != place:
            return size
    return min(-place % LANE_ELEMENTS, size)
