"""The engine that keeps state in host memory and steps it with the processor's vector units."""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np

from stepwire.errors import DataLossError, ResourceExhaustedError, UnsupportedFeatureError
from stepwire_server.engines.cpu.exact_sum import ExactSum
from stepwire_server.engines.cpu.gradient_rows import GradientRows
from stepwire_server.engines.cpu.lane_loop import LaneKernels, LaneLoops
from stepwire_server.engines.cpu.numpy_kernels import NumpyKernels
from stepwire_server.engines.cpu.state import CpuKernels, CpuState
from stepwire_server.engines.cpu.state_arrays import make_slot, slot_bytes
from stepwire_server.engines.cpu.threads import RangeThreads
from stepwire_server.engines.kernel_room import KernelRoom
from stepwire_server.engines.protocol import DeviceInfo, EngineStatistics, ExportedMemory, HostArray
from stepwire_server.engines.regions import Holding
from stepwire_server.host import limits as host
from stepwire_server.rules import Precision, Recipe

__all__ = ["CpuEngine", "NumbaDisabledError", "host_kernels"]


_log = logging.getLogger(__name__)

Made = TypeVar("Made", ExactSum, GradientRows)


class NumbaDisabledError(UnsupportedFeatureError):
    """Numba is told to compile nothing."""


class CpuEngine:
    """Flat arrays in host memory; threads divide large ranges among them. Thread-safe, unlike its states.

    Attributes:
        lanes: the loops of compiled lanes; None where kernels are NumPy's.
    """

    def __init__(
        self, threads: int | None = None, use_numba: bool | None = None, *, lane_spin_microseconds: int = 0
    ) -> None:
        """Start an engine.

        Args:
            threads: the number of threads that work on one call, the caller's included; None for one a processor.
            use_numba: compile kernels, which are many times faster, or evaluate rules with NumPy; None to compile
                where Numba is installed and not disabled.
            lane_spin_microseconds: the moment of spinning of compiled lanes; see `LaneLoops`.

        Raises:
            UnsupportedFeatureError: Numba is to compile, and is broken or disabled.
        """
        self._kernels = _default_kernels() if use_numba is None else _numba_kernels() if use_numba else NumpyKernels()
        self._threads = RangeThreads(threads or host.processor_count())
        self._device = DeviceInfo("cpu", host.processor_name(), host.memory_bytes())
        self.lanes = (
            LaneLoops(self._kernels, lane_spin_microseconds) if isinstance(self._kernels, LaneKernels) else None
        )
        self._states: weakref.WeakSet[CpuState | ExactSum | GradientRows] = weakref.WeakSet()
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

    def staging(self, size: int) -> CpuState:
        """Make a state without slots: it receives gradients of `size` elements, and sums their squares."""
        return CpuState(self._kernels, self._threads, {}, size, ())

    def exact_sum(self, size: int) -> ExactSum:
        """Allocate the sum of several gradients of `size` elements. Every page is touched here.

        Raises:
            ResourceExhaustedError: the machine has no memory left.
        """
        return self._keep(8 * size, lambda: ExactSum(self._kernels, self._threads, size))

    def gradient_rows(self, size: int, rows: int) -> GradientRows:
        """Allocate room for some gradients of `size` elements in float32. Every page is touched here.

        Raises:
            ResourceExhaustedError: the machine has no memory left.
        """
        return self._keep(4 * size * rows, lambda: GradientRows(self._kernels, self._threads, size, rows))

    def prepare_sum(self, gradient: np.dtype[Any]) -> None:
        """Compile the kernels of exact sums of gradients in a wire dtype."""
        for work in ("store", "add"):
            self._kernels.exact(work, gradient)
        for work in ("carry", "odd", "mean"):
            self._kernels.exact(work)

    def prepare_rows(self, gradient: np.dtype[Any]) -> None:
        """Compile the kernels of rows of gradients in a wire dtype, and of their means."""
        self.prepare_sum(np.dtype(np.float32))
        for dtype in (np.dtype(np.float32), gradient):
            self._kernels.rows("keep", dtype)
        self._kernels.rows("sort")
        self._kernels.sum_of_squares(np.dtype(np.float32), False)

    def prepare(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> None:
        """See `Engine.prepare`."""
        self._kernels.update(recipe, gradient, reply)
        if recipe.rule.direction is not None:
            self._kernels.measure(recipe, gradient)
        self._kernels.sum_of_squares(gradient, recipe.accumulates)
        if recipe.accumulates:
            self._kernels.accumulate(gradient)

    def bound_kernels(self, room: KernelRoom) -> None:
        """See `Engine.bound_kernels`."""
        self._kernels.bound(room)

    def prepare_table(self, recipe: Recipe, reply: np.dtype[Any] | None) -> None:
        """See `Engine.prepare_table`."""
        self._kernels.table(recipe, reply)
        self._kernels.sum_of_squares(np.dtype(np.float32), False)

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

    def on_lost(self, tell: Callable[[DataLossError], None]) -> None:
        """See `Engine.on_lost`: the memory of a process lives as long as the process."""

    def rest(self) -> None:
        """See `Engine.rest`: this engine keeps no memory between steps."""

    def close(self) -> None:
        """See `Engine.close`."""
        if self.lanes is not None:
            self.lanes.close()
        self._threads.close()

    def _keep(self, needed_bytes: int, make: Callable[[], Made]) -> Made:
        """Make what aggregates gradients, and count its memory."""
        try:
            made = make()
        except (MemoryError, ValueError, OverflowError) as problem:  # the last two: past the address space
            raise ResourceExhaustedError(
                f"no memory to aggregate gradients ({needed_bytes} bytes); "
                "close a session or use a machine with more memory",
                metadata={"needed_bytes": needed_bytes},
            ) from problem
        with self._lock:
            self._states.add(made)
        return made


@functools.cache
def host_kernels() -> CpuKernels:
    """Return the kernels of sums in the host's memory, whatever engine has the state."""
    return _default_kernels()


def _default_kernels() -> CpuKernels:
    if importlib.util.find_spec("numba") is None:
        return NumpyKernels()
    try:
        return _numba_kernels()
    except NumbaDisabledError as disabled:
        _log.warning("%s", disabled)
        return NumpyKernels()


def _numba_kernels() -> CpuKernels:
    """Import Numba only where it is used, because the import lasts a second.

    Raises:
        UnsupportedFeatureError: Numba is broken, or `NumbaDisabledError`. A broken Numba is no reason to serve many
            times slower without a word: its owner mends it or removes it.
    """
    try:
        from stepwire_server.engines.cpu.numba_kernels import NumbaKernels, is_disabled
    except Exception as problem:  # an import runs whatever an installation holds, and reads settings
        raise UnsupportedFeatureError(
            f"Numba is installed and cannot be imported ({' '.join(f'{type(problem).__name__}: {problem}'.split())}); "
            "mend the installation or the variable NUMBA_…, or uninstall Numba for NumPy, which is many times slower",
            metadata={"field": "device", "feature": "numba"},
        ) from problem
    if is_disabled():
        raise NumbaDisabledError(
            "the kernels are NumPy's, many times slower: NUMBA_DISABLE_JIT is set; unset it to compile kernels",
            metadata={"field": "device", "feature": "numba"},
        )
    return NumbaKernels()
