"""The engine that keeps state in GPU memory, on CuPy. Unverified on a GPU.

The simplest correct form: an array of device memory a slot, one kernel a call, and copies to and from pageable
memory, all on the default stream, which keeps them in order. The tests run it through a stand-in for CuPy that
executes the same generated kernels on the processor, and compile them for real devices.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwire.errors import ResourceExhaustedError, StepwireError
from stepwire_server.engines.chunks import STORED, StagedChunk, bits_of, check_range, convert
from stepwire_server.engines.cuda_source import COMPILE_OPTIONS, sum_module, update_module
from stepwire_server.engines.protocol import PARAM, Device, EngineState, Gradient, HostArray
from stepwire_server.engines.rule_source import kernel_name
from stepwire_server.rules import Rule

__all__ = ["CudaEngine"]

_THREADS = 256
_MOST_BLOCKS = 65_535  # kernels stride over the rest


class CudaEngine:
    """Flat arrays in the memory of one GPU. Unverified on a GPU. Thread-safe, unlike its states."""

    def __init__(self, index: int = 0, cupy: Any = None) -> None:
        """Start an engine.

        Args:
            index: the device, as CUDA numbers the visible ones.
            cupy: the CuPy module, or a stand-in; None to import it, here and nowhere else.
        """
        self.kernels = _Kernels(cupy or importlib.import_module("cupy"), index)
        self._device = self.kernels.describe()

    @property
    def device(self) -> Device:
        """The GPU and its memory."""
        return self._device

    def allocate(self, slots: Sequence[str], size: int) -> CudaState:
        """See `Engine.allocate`. Each slot is an array of its own, so that `adopt` frees what it replaces."""
        cupy = self.kernels.cupy
        try:
            with self.kernels.device():
                arrays = {slot: cupy.zeros(size, np.float32) for slot in slots}
        except cupy.cuda.memory.OutOfMemoryError as problem:
            self.kernels.free_unused()
            needed_bytes = 4 * size * len(slots)
            raise ResourceExhaustedError(
                f"no memory on {self._device.name} ({self._device.description}) for {len(slots)} arrays of {size} "
                f"float32 ({needed_bytes} bytes); close a session or use another device",
                metadata={"needed_bytes": needed_bytes, "device": self._device.name},
            ) from problem
        return CudaState(self.kernels, arrays, size)

    def prepare(self, rule: Rule, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> None:
        """See `Engine.prepare`."""
        self.kernels.update(rule, gradient, reply)
        self.kernels.sum_of_squares(gradient)

    def self_test(self) -> None:
        """Compile and run a kernel, because a missing NVRTC shows only then.

        Raises:
            Exception: whatever CuPy raises, or a StepwireError when the device computes wrongly.
        """
        with contextlib.closing(self.allocate([PARAM], 1)) as state:
            total = state.sum_of_squares(state.stage(np.array([3.0, 4.0], np.float32)), 0, 2)
        if total != 25.0:
            raise StepwireError(f"{self._device.name} computes 3² + 4² = {total}")

    def close(self) -> None:
        """See `Engine.close`. There are no threads; kernels and free memory go back to the device."""
        self.kernels.close()


class CudaState:
    """The arrays of one session; see `EngineState`. Unverified on a GPU."""

    def __init__(self, kernels: _Kernels, arrays: dict[str, Any], size: int) -> None:
        """Take over zeroed `(size,) float32` device arrays, one a slot."""
        self._kernels = kernels
        self._arrays = arrays
        self._size = size

    @property
    def nbytes(self) -> int:
        """See `EngineState.nbytes`."""
        return sum(array.nbytes for array in self._arrays.values())

    def stage(self, payload: HostArray) -> StagedChunk:
        """See `EngineState.stage`."""
        return StagedChunk(payload.dtype, self._kernels.upload(bits_of(payload)))

    def sum_of_squares(self, gradient: Gradient, begin: int, end: int) -> float:
        """See `EngineState.sum_of_squares`; the same bits as on the CPU."""
        assert isinstance(gradient, StagedChunk)
        check_range("gradient", begin, end, len(gradient))
        size = end - begin
        if size == 0:
            return 0.0
        sum_lanes, fold = self._kernels.sum_of_squares(gradient.dtype)
        blocks = -(-size // 65_536)
        with self._kernels.device():
            lanes, folded, sums = (self._kernels.cupy.empty(blocks * n, np.float64) for n in (1024, 32, 1))
            _launch(sum_lanes, blocks * 1024, gradient.values[begin:end], lanes, np.int64(size))
            _launch(fold, blocks * 32, lanes, folded, np.int64(32), np.int64(blocks * 32))
            _launch(fold, blocks, folded, sums, np.int64(1), np.int64(blocks))
            return math.fsum(sums.get())

    def update(
        self,
        rule: Rule,
        scalars: Sequence[float],
        start: int,
        gradient: Gradient,
        begin: int,
        end: int,
        out: HostArray | None,
    ) -> None:
        """See `EngineState.update`."""
        assert isinstance(gradient, StagedChunk)
        size = end - begin
        check_range("gradient", begin, end, len(gradient))
        check_range("state", start, start + size, self._size)
        if out is not None:
            check_range("answer", 0, size, len(out))
        if size == 0:
            return
        kernel = self._kernels.update(rule, gradient.dtype, None if out is None else out.dtype)
        arrays = [self._arrays[slot][start : start + size] for slot in (PARAM, *rule.slots)]
        numbers = [np.int64(size), *(np.float32(scalar) for scalar in scalars)]
        with self._kernels.device():
            answer = [] if out is None else [self._kernels.cupy.empty(size, STORED[out.dtype])]
            _launch(kernel, size, *arrays, gradient.values[begin:end], *answer, *numbers)
            if out is not None:
                answer[0].get(out=bits_of(out[:size]))

    def read(self, slot: str, start: int, out: HostArray) -> None:
        """See `EngineState.read`; encoded on the host."""
        check_range("state", start, start + len(out), self._size)
        convert(self._arrays[slot][start : start + len(out)].get(), out)

    def write(self, slot: str, start: int, values: HostArray) -> None:
        """See `EngineState.write`; decoded on the host."""
        check_range("state", start, start + len(values), self._size)
        decoded = np.empty(len(values), np.float32)
        convert(values, decoded)
        self._kernels.overwrite(self._arrays[slot][start : start + len(values)], decoded)

    def adopt(self, other: EngineState) -> None:
        """See `EngineState.adopt`."""
        assert isinstance(other, CudaState) and other._size == self._size
        self._arrays.update(other._arrays)
        other.close()

    def close(self) -> None:
        """See `EngineState.close`."""
        self._arrays = {}
        self._size = 0
        self._kernels.free_unused()


class _Kernels:
    """One device as CuPy gives access to it: compiled kernels and copies. Thread-safe."""

    def __init__(self, cupy: Any, index: int) -> None:
        self.cupy = cupy
        self._index = index
        self._modules: dict[tuple[Any, ...], Any] = {}
        self._lock = threading.Lock()

    def device(self) -> contextlib.AbstractContextManager[Any]:
        """Make the device current in this thread; CuPy's device objects must not be shared among threads."""
        context: contextlib.AbstractContextManager[Any] = self.cupy.cuda.Device(self._index)
        return context

    def describe(self) -> Device:
        name = self.cupy.cuda.runtime.getDeviceProperties(self._index)["name"].decode()
        _, memory_bytes = self.cupy.cuda.Device(self._index).mem_info
        return Device(f"cuda:{self._index}", name, memory_bytes)

    def upload(self, values: HostArray) -> Any:
        with self.device():
            copy = self.cupy.empty(len(values), values.dtype)
            self.overwrite(copy, values)
        return copy

    def overwrite(self, array: Any, values: HostArray) -> None:
        """Copy from the host and wait: some machines copy even pageable memory after the call has returned."""
        with self.device():
            array.set(values)
            self.cupy.cuda.get_current_stream().synchronize()

    def update(self, rule: Rule, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Any:
        """Return the fused kernel; `update_module` documents its arguments."""
        key = (rule.update, gradient, reply)
        module = self._modules.get(key)
        wire = (gradient.name, reply.name if reply is not None else None)
        module = module or self._compile(key, update_module([(rule, *wire)]))
        return module.get_function(kernel_name(rule, *wire))

    def sum_of_squares(self, gradient: np.dtype[Any]) -> tuple[Any, Any]:
        """Return the kernels `sum_lanes` and `fold`; `sum_module` documents their arguments."""
        module = self._modules.get(("sum",)) or self._compile(("sum",), sum_module())
        return module.get_function(f"sum_lanes_{gradient.name}"), module.get_function("fold")

    def close(self) -> None:
        self._modules = {}
        self.free_unused()

    def free_unused(self) -> None:
        """Give memory that no array holds back to the device, for other processes."""
        with self.device():
            self.cupy.get_default_memory_pool().free_all_blocks()

    def _compile(self, key: tuple[Any, ...], source: str) -> Any:
        with self._lock, self.device():
            if key not in self._modules:
                module = self.cupy.RawModule(code=source, options=COMPILE_OPTIONS)
                module.compile()
                self._modules[key] = module
            return self._modules[key]


def _launch(kernel: Any, size: int, *arguments: Any) -> None:
    """Run a kernel over `size` elements, at least one, on the current device."""
    blocks = min(-(-size // _THREADS), _MOST_BLOCKS)
    kernel((blocks,), (_THREADS,), arguments)
