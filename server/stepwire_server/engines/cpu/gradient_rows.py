"""Several gradients side by side in float32, and means of them that bad ones cannot move far."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stepwire_server.engines.cpu.exact_sum import ERROR_BLOCK, ExactSum
from stepwire_server.engines.cpu.sorting_network import network
from stepwire_server.engines.cpu.state import LEAST_SHARED_UPDATE, CpuKernels, CpuState
from stepwire_server.engines.cpu.threads import RangeThreads
from stepwire_server.engines.payloads import GradientChunk, check_range
from stepwire_server.engines.protocol import Gradient, HostArray

__all__ = ["GradientRows"]

_FLOAT32 = np.dtype(np.float32)

Fill = Callable[[ExactSum, int, int], float]


class GradientRows:
    """One row of float32 a gradient. Not thread-safe: its owner serialises the calls.

    A mean is written over the first row, so it is the last use of the rows before they are written anew. The order of
    rows changes no bit. NaN has no rank: whoever writes rows keeps NaN and Inf out of them.
    """

    def __init__(self, kernels: CpuKernels, threads: RangeThreads, size: int, rows: int) -> None:
        """Make `rows` zeroed rows of `size` elements."""
        self._kernels = kernels
        self._threads = threads
        self._size = size
        self._rows: HostArray = np.empty((rows, size), np.float32)
        self._rows.fill(0.0)
        self._squares = CpuState(kernels, threads, {}, size, ())

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self._rows.nbytes

    def write(self, row: int, start: int, gradient: Gradient, begin: int, end: int, factor: float) -> None:
        """Make a row's elements from flat element `start` on `gradient[begin:end] · factor`, each a float32.

        Args:
            row: the index of the row.
            start: the first flat element.
            gradient: a chunk from `CpuState.receive`.
            begin: first element within the chunk.
            end: one past the last element within the chunk.
            factor: used as float32.
        """
        assert isinstance(gradient, GradientChunk)
        check_range("gradient", begin, end, gradient.count)
        check_range("row", start, start + end - begin, self._size)
        kernel, target = self._kernels.rows("keep", gradient.dtype), self._rows[row]

        def work(first: int, size: int) -> None:
            kernel(target, gradient.values, start + first, begin + first, size, factor)

        self._threads.run(work, end - begin, LEAST_SHARED_UPDATE)

    def zero(self, row: int, start: int, end: int) -> None:
        """Zero a row's elements `[start, end)`."""
        self._rows[row, start:end] = 0.0

    def values(self, row: int) -> HostArray:
        """Return a row, `(size,) float32`."""
        values: HostArray = self._rows[row]
        return values

    def sum_of_squares(self, row: int) -> float:
        """Sum the squares of a row, as `EngineState.sum_of_squares` does."""
        return self._squares.sum_of_squares(self._chunk(self._rows[row]), 0, self._size, 1.0).wait()

    def ranked_mean(self, count: int, low: int, high: int) -> HostArray:
        """Return for each element the mean of the values of ranks `[low, high)` among the first `count` rows.

        The sum is exact, divided once and rounded once.

        Returns:
            `(size,) float32`, in the memory of the first row.
        """
        rows, pairs = self._rows[:count], network(count, low, high)
        kernel = self._kernels.rows("sort")

        def of_range() -> Fill:
            ranked = np.empty((high - low, min(ERROR_BLOCK, self._size)), np.float32)
            chunks = [self._chunk(row) for row in ranked]

            def fill(total: ExactSum, start: int, size: int) -> float:
                kernel(rows, pairs, ranked, start, low, size)
                for chunk in chunks:
                    total.add(0, chunk, 0, size, 1.0)
                return float(high - low)

            return fill

        return self._mean(of_range)

    def scaled_mean(self, factors: Sequence[float]) -> HostArray:
        """Return the mean of the first rows times factors, each product a float32; else as `ranked_mean`.

        Args:
            factors: the factor of each row, used as float32.
        """
        kernel = self._kernels.rows("keep", _FLOAT32)
        rows = [self._chunk(row).values for row in self._rows[: len(factors)]]

        def of_range() -> Fill:
            products = np.empty(min(ERROR_BLOCK, self._size), np.float32)
            chunk = self._chunk(products)

            def fill(total: ExactSum, start: int, size: int) -> float:
                for row, factor in zip(rows, factors, strict=True):
                    kernel(products, row, 0, start, size, factor)
                    total.add(0, chunk, 0, size, 1.0)
                return float(len(factors))

            return fill

        return self._mean(of_range)

    def close(self) -> None:
        """Give the memory back. Closing twice is harmless."""
        self._rows = np.empty((0, 0), np.float32)
        self._size = 0

    def _mean(self, of_range: Callable[[], Fill]) -> HostArray:
        """Add up some elements at a time, which stay in cache, and write their means over those of the first row.

        Args:
            of_range: makes the function that adds the elements `[start, start + size)` to a sum and returns the
                divisor; called once a thread.
        """
        out: HostArray = self._rows[0]

        def work(first: int, size: int) -> None:
            fill, total = of_range(), ExactSum(self._kernels, self._threads, min(ERROR_BLOCK, self._size))
            for start in range(first, first + size, ERROR_BLOCK):
                end = min(start + ERROR_BLOCK, first + size)
                divisor = fill(total, start, end - start)
                out[start:end] = total.mean(divisor)[: end - start]
                total.clear()

        self._threads.run(work, self._size, 2 * ERROR_BLOCK)
        return out

    def _chunk(self, values: HostArray) -> GradientChunk:
        return GradientChunk(_FLOAT32, self._kernels.source(values), len(values))
