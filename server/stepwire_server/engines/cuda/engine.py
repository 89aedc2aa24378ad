"""The engine that keeps state in GPU memory, on CuPy. Unverified on a GPU.

A step crosses three streams. Received bytes go up to the device while kernels run on the bytes before them. The kernel
encodes the new parameters, which go down while the next range is computed.

The tests run all of it through a stand-in for CuPy, which executes the same generated kernels on the processor. They
try every order that streams and events allow, and compile the kernels for real devices.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from stepwire.errors import DataLossError, StepwireError, UnsupportedFeatureError
from stepwire.transports.cuda.driver import CudaDriver, CudaFailure
from stepwire_server.engines.compiled.common_kernels import commonest
from stepwire_server.engines.cuda.bus import Bus
from stepwire_server.engines.cuda.compiler import Compiler
from stepwire_server.engines.cuda.device import CudaDevice
from stepwire_server.engines.cuda.gradient import GradientCache
from stepwire_server.engines.cuda.ipc_memory import CudaExportedMemory
from stepwire_server.engines.cuda.kernels import CudaKernels
from stepwire_server.engines.cuda.resources import CudaResources
from stepwire_server.engines.cuda.source import eight_bit_tables
from stepwire_server.engines.cuda.state import CudaState
from stepwire_server.engines.cuda.state_arrays import Slab
from stepwire_server.engines.cuda.sums import Cells
from stepwire_server.engines.kernel_room import KernelRoom
from stepwire_server.engines.protocol import PARAM, DeviceInfo, EngineStatistics, HostArray
from stepwire_server.engines.regions import Holding
from stepwire_server.rules import Precision, Recipe

__all__ = ["CudaEngine", "CudaOptions"]


class CudaOptions(NamedTuple):
    """The sizes of an engine's working memory.

    Attributes:
        buffers: the number of pinned buffers of the bus, each way; with fewer than 3 something always waits.
        buffer_bytes: the bytes of each buffer.
        gradient_cache_bytes: the device memory for gradients that is kept from one step to the next, until memory is
            short or no step comes. 0 stands for a sixteenth of the memory, or for one gradient if that is larger.
        cells: the number of results that there is room for from the start. The default suffices for the most clients
            of a server, each silent in the middle of a step.
    """

    buffers: int = 4
    buffer_bytes: int = 16 << 20
    gradient_cache_bytes: int = 0
    cells: int = 320


_DEFAULTS: Final = CudaOptions()

# The room for machine code in the default budget: that of hundreds of kernels.
_MOST_CODE_BYTES: Final = 64 << 20


class CudaEngine:
    """Flat arrays in the memory of one GPU. Unverified on a GPU. Thread-safe, unlike its states."""

    def __init__(self, index: int = 0, cupy: Any = None, options: CudaOptions = _DEFAULTS, libcuda: Any = None) -> None:
        """Start an engine.

        Args:
            index: the device, as CUDA numbers the visible ones.
            cupy: the CuPy module, or a stand-in; None to import it, here and nowhere else.
            options: sizes of working memory.
            libcuda: the driver's library, or a stand-in; None to load it where it is needed.

        Raises:
            ResourceExhaustedError: the device has no memory left.
        """
        device = CudaDevice(cupy or importlib.import_module("cupy"), index)
        self._libcuda = libcuda
        free_bytes, all_bytes = device.memory()  # with the context of this process, which the first call made
        self._taken_bytes = all_bytes - free_bytes
        tables, bus = eight_bit_tables(), Bus(device, options.buffers, options.buffer_bytes)
        self._resources = CudaResources(
            device,
            CudaKernels(device, Compiler(device)),
            bus,
            Cells(device, options.cells),
            GradientCache(device, options.gradient_cache_bytes or free_bytes // 16, not options.gradient_cache_bytes),
            device.allocate(tables.nbytes).view(np.uint32),
        )
        bus.send(tables, self._resources.tables_address)
        device.settle(device.up)
        device.on_shortage(self._resources.gradients.trim)
        self._states: weakref.WeakSet[CudaState] = weakref.WeakSet()
        self._lock = threading.Lock()
        working_bytes = self._resources.working_bytes + min(_MOST_CODE_BYTES, free_bytes // 64)
        self._device = DeviceInfo(device.name, device.description, free_bytes, working_bytes)

    @property
    def device(self) -> DeviceInfo:
        """The GPU, its free memory at the start, and the working memory of the engine."""
        return self._device

    @property
    def bus(self) -> Bus:
        """The way to the device, where memory can be pinned."""
        return self._resources.bus

    def statistics(self) -> EngineStatistics:
        """See `Engine.statistics`; the thread that calls asks the device."""
        with self._lock:
            allocated_bytes = sum(state.nbytes for state in self._states)
        resources = self._resources
        return EngineStatistics(
            allocated_bytes,
            resources.gradients.kept_bytes,
            self._device.working_bytes,
            1,
            resources.kernels.code_bytes,
            self._taken_bytes,
        )

    def state_bytes(self, slots: Mapping[str, Holding], size: int) -> int:
        """See `Engine.state_bytes`."""
        return Slab(slots, size).nbytes

    def allocate(self, slots: Mapping[str, Holding], size: int) -> CudaState:
        """See `Engine.allocate`. One allocation holds all slots."""
        slab, device = Slab(slots, size), self._resources.device
        memory = device.allocate(slab.nbytes)
        device.zero(memory)
        state = CudaState(self._resources, memory, slab.place(device, memory), size)
        state.settle()
        with self._lock:
            self._states.add(state)
        return state

    def prepare(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> None:
        """See `Engine.prepare`."""
        kernels = self._resources.kernels
        kernels.update(recipe, gradient, reply)
        if recipe.rule.direction is not None:
            kernels.measure(recipe, gradient)
        kernels.sum(gradient, accumulated=False)
        if recipe.precision is Precision.INT8:
            kernels.of_blocks("decode_signed_blocks")

    def bound_kernels(self, room: KernelRoom) -> None:
        """See `Engine.bound_kernels`: the least recently used kernel is unloaded."""
        self._resources.kernels.most = room.most

    def prepare_table(self, recipe: Recipe, reply: np.dtype[Any] | None) -> None:
        """See `Engine.prepare_table`."""
        kernels = self._resources.kernels
        kernels.table(recipe, reply)
        kernels.sum(np.dtype(np.float32), accumulated=False)
        kernels.of_tables("gather_float32")

    @contextlib.contextmanager
    def pin(self, memory: HostArray) -> Iterator[None]:
        """See `Engine.pin`. Memory that cannot be pinned, for want of permission or of memory, goes through buffers."""
        with contextlib.ExitStack() as pinned:
            try:
                pinned.enter_context(self._resources.bus.pin(memory))
            except Exception as problem:
                import structlog  # here, because the engine alone runs where the server's other packages are not

                structlog.get_logger().warning(
                    "memory stays unpinned", device=self._device.name, bytes=memory.nbytes, problem=str(problem)
                )
            yield

    def export(self, nbytes: int) -> CudaExportedMemory:
        """See `Engine.export`."""
        device = self._resources.device
        try:
            driver = CudaDriver(self._libcuda)
        except CudaFailure as problem:
            raise UnsupportedFeatureError(
                f"{device.name} shares no memory: {problem}",
                metadata={"feature": "transport_cuda_ipc", "device": device.name},
            ) from problem
        return CudaExportedMemory(device, driver, nbytes)

    def warm_up(self) -> None:
        """See `Engine.warm_up`."""
        for asked in commonest():
            self.prepare(*asked)

    def self_test(self) -> None:
        """Compile and run a kernel, because a missing NVRTC shows only then.

        Raises:
            StepwireError: the device computes wrongly.
            Exception: the device or NVRTC failed; CuPy has no common base for its errors.
        """
        state = self.allocate({PARAM: Precision.FLOAT32}, 2)
        gradient = state.receive()
        try:
            chunk = gradient.put(0, np.array([3.0, 4.0], np.float32))
            total = state.sum_of_squares(chunk, 0, 2, 1.0).wait()
        finally:
            gradient.close()
            state.close()
        if total != 25.0:
            raise StepwireError(f"{self._device.name} computes 3² + 4² = {total}")

    def on_lost(self, tell: Callable[[DataLossError], None]) -> None:
        """See `Engine.on_lost`."""
        self._resources.device.on_lost(tell)

    def rest(self) -> None:
        """See `Engine.rest`."""
        self._resources.gradients.trim()

    def close(self) -> None:
        """See `Engine.close`. There are no threads; kernels and memory go back to the device."""
        self._resources.gradients.trim()
        self._resources.device.on_shortage(lambda: None)  # no cycle that keeps memory
        self._resources.device.on_lost(lambda _: None)
        self._resources.kernels.close()
