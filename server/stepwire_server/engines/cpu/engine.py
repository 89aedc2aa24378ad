"""The engine that keeps state in host memory and steps it with the processor's vector units."""

from __future__ import annotations

import importlib.util
import threading
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from stepwire.errors import ResourceExhaustedError, UnsupportedFeatureError
from stepwire_server.engines.cpu.numpy_kernels import NumpyKernels
from stepwire_server.engines.cpu.state import CpuKernels, CpuState
from stepwire_server.engines.cpu.state_arrays import make_slot, slot_bytes
from stepwire_server.engines.cpu.threads import RangeThreads
from stepwire_server.engines.protocol import DeviceInfo, EngineStatistics, ExportedMemory, HostArray
from stepwire_server.engines.regions import Holding
from stepwire_server.host import limits as host
from stepwire_server.rules import Precision, Recipe

__all__ = ["CpuEngine"]


class CpuEngine:
    """Flat arrays in host memory; threads divide large ranges among them. Thread-safe, unlike its states."""

    def __init__(self, threads: int | None = None, use_numba: bool | None = None) -> None:
        """Start an engine.

        Args:
            threads: the number of threads that work on one call, the caller's included; None for one a processor.
            use_numba: compile kernels, which are many times faster, or evaluate rules with NumPy; None to compile
                where Numba is installed.
        """
        if use_numba is None:
            use_numba = importlib.util.find_spec("numba") is not None
        self._kernels = _numba_kernels() if use_numba else NumpyKernels()
        self._threads = RangeThreads(threads or host.processor_count())
        self._device = DeviceInfo("cpu", host.processor_name(), host.memory_bytes())
        self._states: weakref.WeakSet[CpuState] = weakref.WeakSet()
        self._lock = threading.Lock()

    @property
    def device(self) -> DeviceInfo:
        """The processor and its memory."""
        return self._device

    def statistics(self) -> EngineStatistics:
        """See `Engine.statistics`."""
        with self._lock:
            allocated_bytes = sum(state.nbytes for state in self._states)
        return EngineStatistics(allocated_bytes, 0, 0, self._threads.threads)

    def state_bytes(self, slots: Mapping[str, Holding], size: int) -> int:
        """See `Engine.state_bytes`."""
        return sum(slot_bytes(held, size) for held in slots.values())

    def allocate(self, slots: Mapping[str, Holding], size: int) -> CpuState:
        """See `Engine.allocate`. Every page is touched here, so that no step has to wait for the system to map it."""
        try:
            made = {name: make_slot(name, held, size) for name, held in slots.items()}
        except (MemoryError, ValueError, OverflowError) as problem:  # the last two: past the address space
            needed_bytes = self.state_bytes(slots, size)
            raise ResourceExhaustedError(
                f"no memory for {len(slots)} arrays of {size} elements ({needed_bytes} bytes); "
                "close a session or use a machine with more memory",
                metadata={"needed_bytes": needed_bytes},
            ) from problem
        regions = next((held for held in slots.values() if not isinstance(held, Precision)), ())
        state = CpuState(self._kernels, self._threads, made, size, regions)
        with self._lock:
            self._states.add(state)
        return state

    def prepare(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> None:
        """See `Engine.prepare`."""
        self._kernels.update(recipe, gradient, reply)
        if recipe.rule.direction is not None:
            self._kernels.measure(recipe, gradient)
        self._kernels.sum_of_squares(gradient, recipe.accumulates)
        if recipe.accumulates:
            self._kernels.accumulate(gradient)

    def pin(self, memory: HostArray) -> AbstractContextManager[None]:
        """See `Engine.pin`: it makes no difference here."""
        return nullcontext()

    def export(self, nbytes: int) -> ExportedMemory:
        """See `Engine.export`: there is no device whose memory it could be."""
        raise UnsupportedFeatureError(
            "the session lives on cpu, whose memory is the host's; use transport 'shm', or a session on a GPU",
            metadata={"feature": "transport_cuda_ipc"},
        )

    def warm_up(self) -> None:
        """See `Engine.warm_up`: cached kernels load in no time, and the others belong to no session yet."""

    def rest(self) -> None:
        """See `Engine.rest`: this engine keeps no memory between steps."""

    def close(self) -> None:
        """See `Engine.close`."""
        self._threads.close()


def _numba_kernels() -> CpuKernels:
    """Import Numba only where it is used, because the import lasts a second."""
    from stepwire_server.engines.cpu.numba_kernels import NumbaKernels

    return NumbaKernels()
