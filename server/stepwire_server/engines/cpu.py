"""The engine that keeps state in host memory and steps it with the processor's vector units."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from stepwire.errors import ResourceExhaustedError
from stepwire_server.engines import host
from stepwire_server.engines.chunks import StagedChunk, check_range, convert
from stepwire_server.engines.numpy_kernels import NumpyKernels
from stepwire_server.engines.protocol import PARAM, Device, EngineState, Gradient, HostArray
from stepwire_server.rules import Rule

__all__ = ["CpuEngine", "CpuKernels"]

# Elements of one block of a sum of squares, and the grain in which threads share a range.
GRAIN = 65_536

# Elements from which a second thread pays: handing it a share costs about 60 µs (0.9 ns an element to update,
# 0.17 to sum, on one thread).
LEAST_SHARED_UPDATE = 3 * GRAIN
LEAST_SHARED_SUM = 16 * GRAIN


class CpuKernels(Protocol):
    """What `NumbaKernels` and `NumpyKernels` have in common; the former documents it."""

    def source(self, payload: HostArray) -> HostArray:
        """View a chunk of any wire dtype as the kernels read it."""
        ...

    def target(self, out: HostArray) -> HostArray:
        """View an array of any wire dtype as the kernels write it."""
        ...

    def update(self, rule: Rule, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Callable[..., None]:
        """Return the kernel that steps a range."""
        ...

    def sum_of_squares(self, gradient: np.dtype[Any]) -> Callable[..., None]:
        """Return the kernel that sums squares in blocks."""
        ...


class CpuEngine:
    """Flat arrays in host memory; large ranges are shared among threads. Thread-safe, unlike its states."""

    def __init__(self, threads: int | None = None, use_numba: bool | None = None) -> None:
        """Start an engine.

        Args:
            threads: threads that work on one call, the caller's included; None for one a processor.
            use_numba: compile kernels (many times faster), or evaluate rules with NumPy; None for whatever
                is installed.
        """
        if use_numba is None:
            use_numba = importlib.util.find_spec("numba") is not None
        self._kernels = _numba_kernels() if use_numba else NumpyKernels()
        # NumPy would spend a second thread on waiting for the GIL.
        self._shares = _Shares((threads or host.processor_count()) if use_numba else 1)
        self._device = Device("cpu", host.processor_name(), host.memory_bytes())

    @property
    def device(self) -> Device:
        """The processor and its memory."""
        return self._device

    def allocate(self, slots: Sequence[str], size: int) -> CpuState:
        """See `Engine.allocate`. Every page is touched here, so that no step has to wait for the system to map it."""
        try:
            arrays = {slot: np.empty(size, np.float32) for slot in slots}
        except (MemoryError, ValueError, OverflowError) as problem:  # the last two: past the address space
            needed_bytes = 4 * size * len(slots)
            raise ResourceExhaustedError(
                f"no memory for {len(slots)} arrays of {size} float32 ({needed_bytes} bytes); "
                "close a session or use a machine with more memory",
                metadata={"needed_bytes": needed_bytes},
            ) from problem
        for array in arrays.values():
            array.fill(0.0)
        return CpuState(self._kernels, self._shares, arrays, size)

    def prepare(self, rule: Rule, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> None:
        """See `Engine.prepare`."""
        self._kernels.update(rule, gradient, reply)
        self._kernels.sum_of_squares(gradient)

    def close(self) -> None:
        """See `Engine.close`."""
        self._shares.close()


class CpuState:
    """The arrays of one session; see `EngineState`."""

    def __init__(self, kernels: CpuKernels, shares: _Shares, arrays: dict[str, HostArray], size: int) -> None:
        """Take over zeroed `(size,) float32` arrays, one a slot."""
        self._kernels = kernels
        self._shares = shares
        self._arrays = arrays
        self._size = size

    @property
    def nbytes(self) -> int:
        """See `EngineState.nbytes`."""
        return sum(array.nbytes for array in self._arrays.values())

    def stage(self, payload: HostArray) -> StagedChunk:
        """See `EngineState.stage`; nothing is copied, an unaligned chunk neither."""
        return StagedChunk(payload.dtype, self._kernels.source(payload))

    def sum_of_squares(self, gradient: Gradient, begin: int, end: int) -> float:
        """See `EngineState.sum_of_squares`; the same bits with any number of threads."""
        assert isinstance(gradient, StagedChunk)
        check_range("gradient", begin, end, len(gradient))
        partials = np.zeros(-(-(end - begin) // GRAIN))
        kernel = self._kernels.sum_of_squares(gradient.dtype)

        def work(first: int, size: int) -> None:
            kernel(gradient.values, begin, first, size, GRAIN, partials)

        self._shares.run(work, end - begin, LEAST_SHARED_SUM)
        return math.fsum(partials)

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
        check_range("gradient", begin, end, len(gradient))
        check_range("state", start, start + end - begin, self._size)
        if out is not None:
            check_range("out", 0, end - begin, len(out))
        kernel = self._kernels.update(rule, gradient.dtype, None if out is None else out.dtype)
        arrays = [self._arrays[PARAM], *[self._arrays[slot] for slot in rule.slots]]
        target = None if out is None else self._kernels.target(out)

        def work(first: int, size: int) -> None:
            kernel(*arrays, gradient.values, target, start + first, begin + first, first, size, *scalars)

        self._shares.run(work, end - begin, LEAST_SHARED_UPDATE)

    def read(self, slot: str, start: int, out: HostArray) -> None:
        """See `EngineState.read`."""
        check_range("state", start, start + len(out), self._size)
        convert(self._arrays[slot][start : start + len(out)], out)

    def write(self, slot: str, start: int, values: HostArray) -> None:
        """See `EngineState.write`."""
        check_range("state", start, start + len(values), self._size)
        convert(values, self._arrays[slot][start : start + len(values)])

    def adopt(self, other: EngineState) -> None:
        """See `EngineState.adopt`."""
        assert isinstance(other, CpuState) and other._size == self._size
        self._arrays.update(other._arrays)
        other.close()

    def close(self) -> None:
        """See `EngineState.close`."""
        self._arrays = {}
        self._size = 0


class _Shares:
    """A few threads that the callers of an engine share."""

    def __init__(self, threads: int) -> None:
        """Prepare to work with `threads` threads, the caller's included."""
        self._threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(max(threads - 1, 1), "stepwire-cpu")

    def run(self, work: Callable[[int, int], None], size: int, least: int) -> None:
        """Call `work(first, size)` for shares that together make up `[0, size)`, and wait for all of them.

        Ranges of fewer than `least` elements are not shared. Shares are few and large, one a thread and the first
        for the caller: tasks of 1 MiB took twice as long. Workers only run kernels and wait for nobody, so
        callers that queue here cannot deadlock.
        """
        share = GRAIN * -(-size // (GRAIN * self._threads))
        if size < least or share >= size:
            work(0, size)
            return
        others = [self._pool.submit(work, low, min(share, size - low)) for low in range(share, size, share)]
        try:
            work(0, share)
        finally:
            concurrent.futures.wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """Stop the threads once they are idle."""
        self._pool.shutdown()


def _numba_kernels() -> CpuKernels:
    """Import Numba only where it is used: that takes a second."""
    from stepwire_server.engines.numba_kernels import NumbaKernels

    return NumbaKernels()
