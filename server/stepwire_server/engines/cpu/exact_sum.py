"""The sum of several gradients without any rounding, and its quotient, rounded once.

The float64 sum of float32 gradients is almost always exact. TwoSum finds the error of one that is not. Errors are kept
in further levels, each the float64 sum of the errors of the level before, in the few blocks that have any. So the
levels together are the exact sum, whatever the order of gradients, chunks and threads.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any, Final

import numpy as np

from stepwire_server.engines.cpu.state import CpuKernels
from stepwire_server.engines.cpu.threads import RangeThreads
from stepwire_server.engines.payloads import GradientChunk, check_range
from stepwire_server.engines.protocol import GRAIN, Gradient, HostArray

__all__ = ["ERROR_BLOCK", "EXACT_DIVISOR_BITS", "ExactSum", "rounded_quotient", "significant_bits"]

ERROR_BLOCK: Final = GRAIN // 4
"""The elements whose errors are kept together."""

# Products and quotients within these powers of two neither overflow nor lose bits below the smallest float64.
_LEAST: Final = 2.0**-400
_MOST: Final = 2.0**400
EXACT_DIVISOR_BITS: Final = 27
"""A divisor of so few bits, times the middle of two float32, is an even float64. A total in odd compares well to it."""

_LEAST_SHARED: Final = 4 * GRAIN
"""The elements from which a second thread pays; one thread adds an element in about 0.6 ns."""

# The results of the kernel that carries errors.
_INEXACT: Final = 1
_CHANGED: Final = 2


class ExactSum:
    """The exact sum of gradients times factors. Not thread-safe: its owner serialises the calls.

    An element to which nothing was added is 0. NaN and Inf stay in the sum. The product of a gradient and its factor is
    exact for factors of at most 29 bits, and rounded once to float64 for others.
    """

    def __init__(self, kernels: CpuKernels, threads: RangeThreads, size: int) -> None:
        """Make the sum of nothing, for gradients of `size` elements."""
        self._kernels = kernels
        self._threads = threads
        self._size = size
        self._total: HostArray = np.empty(size, np.float64)
        self._total.fill(0.0)
        self._levels: dict[int, list[HostArray]] = {}
        self._error_bytes = 0
        self._stored = _Ranges()
        self._divided = False
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of memory held: 8 an element, and the errors."""
        return self._total.nbytes + self._error_bytes

    def add(self, start: int, gradient: Gradient, begin: int, end: int, factor: float) -> None:
        """Add `gradient[begin:end] · factor` from flat element `start` on.

        Args:
            start: the first flat element.
            gradient: a chunk from `CpuState.receive`.
            begin: first element within the chunk.
            end: one past the last element within the chunk.
            factor: float64; 0, or a magnitude within 2⁻⁴⁰⁰ and 2⁴⁰⁰.

        Raises:
            MemoryError: there is none for the errors; the sum holds a part of the gradient, until `clear`.
        """
        assert isinstance(gradient, GradientChunk) and not self._divided
        assert factor == 0.0 or _is_within(factor)
        check_range("gradient", begin, end, gradient.count)
        check_range("sum", start, start + end - begin, self._size)
        for low, high, stored in self._stored.parts(start, start + end - begin):
            add = self._add if stored else self._store
            add(low, high, gradient, begin + low - start, factor)
        self._stored.add(start, start + end - begin)

    def mean(self, divisor: float) -> HostArray:
        """Divide the sum and round the quotient once, to float32.

        The sum is used up: it takes nothing more until `clear`.

        Args:
            divisor: float64, within 2⁻⁴⁰⁰ and 2⁴⁰⁰.

        Returns:
            `(size,) float32` in the memory of the sum, valid until `clear`.
        """
        assert divisor > 0.0 and _is_within(divisor) and not self._divided
        self._divided = True
        for low, high, stored in self._stored.parts(0, self._size):
            if not stored:
                self._total[low:high] = 0.0
        doubtful = self._fold(divisor) if self._levels else {}
        out = self._total.view(np.float32)[: self._size]
        kernel = self._kernels.exact("mean")
        # The elements [n, 2n) lie behind the quotients of all before them. So threads divide that range together, once
        # the quotients before it are there.
        done, end = 0, min(GRAIN, self._size)
        while done < end:
            self._threads.run(partial(_divide, kernel, (self._total, out), done, divisor), end - done, _LEAST_SHARED)
            done, end = end, min(2 * end, self._size)
        for index, value in doubtful.items():
            out[index] = value
        return out

    def clear(self) -> None:
        """Become the sum of nothing again."""
        self._levels = {}
        self._error_bytes = 0
        self._stored = _Ranges()
        self._divided = False

    def close(self) -> None:
        """Give the memory back. Closing twice is harmless."""
        self.clear()
        self._total = np.empty(0, np.float64)
        self._size = 0

    def _store(self, start: int, end: int, gradient: GradientChunk, begin: int, factor: float) -> None:
        kernel = self._kernels.exact("store", gradient.dtype)

        def work(first: int, size: int) -> None:
            kernel(self._total, gradient.values, start + first, begin + first, size, factor)

        self._threads.run(work, end - start, _LEAST_SHARED)

    def _add(self, start: int, end: int, gradient: GradientChunk, begin: int, factor: float) -> None:
        """Add to elements that have a sum. Threads have whole blocks, so that none meets another at a level."""
        kernel = self._kernels.exact("add", gradient.dtype)
        base = start - start % ERROR_BLOCK

        def work(first: int, size: int) -> None:
            at, last = max(start, base + first), min(end, base + first + size)
            errors = np.empty(ERROR_BLOCK, np.float64)
            while done := kernel(
                self._total, gradient.values, errors, at, begin + at - start, last - at, factor, ERROR_BLOCK
            ):
                at += done
                self._carry((at - 1) // ERROR_BLOCK, errors)

        self._threads.run(work, end - base, _LEAST_SHARED)

    def _carry(self, block: int, errors: HostArray) -> None:
        """Add the errors of a block to its first level, the errors of that to the next, until there are none."""
        kernel, levels = self._kernels.exact("carry"), self._levels.setdefault(block, [])
        errors = errors[: self._size - block * ERROR_BLOCK]
        for level in levels:
            if not kernel(level, errors) & _INEXACT:
                return
        levels.append(errors.copy())
        with self._lock:
            self._error_bytes += errors.nbytes

    def _fold(self, divisor: float) -> dict[int, np.float32]:
        """Round the total of each block and its levels to odd, and return the quotients that this does not decide."""
        doubtful: dict[int, np.float32] = {}

        def work(first: int, size: int) -> None:
            for block in range(first // ERROR_BLOCK, -(-(first + size) // ERROR_BLOCK)):
                if block in self._levels:
                    doubtful.update(self._fold_block(block, divisor))

        self._threads.run(work, self._size, _LEAST_SHARED)
        return doubtful

    def _fold_block(self, block: int, divisor: float) -> dict[int, np.float32]:
        start, levels = block * ERROR_BLOCK, self._levels[block]
        total = self._total[start : start + ERROR_BLOCK]
        carry, changed = self._kernels.exact("carry"), True
        while changed:  # until each level is below half a unit of the one above, and the first has the error's sign
            changed = False
            for upper, lower in reversed([*pairwise([total, *levels])]):
                changed |= bool(carry(upper, lower) & _CHANGED)
        nearest = total.copy()
        self._kernels.exact("odd")(total, levels[0])
        if significant_bits(divisor) <= EXACT_DIVISOR_BITS:
            return {}
        bounds = [np.empty(len(total), np.float32) for _ in range(2)]
        for bound, out in zip((-np.inf, np.inf), bounds, strict=True):
            with np.errstate(all="ignore"):
                near = np.nextafter(total, bound)
            self._kernels.exact("mean")(near, out, 0, len(total), divisor, 0.0)
        places = np.flatnonzero((bounds[0].view(np.uint32) != bounds[1].view(np.uint32)) & (levels[0] != 0.0))
        exact = {place: sum(Fraction(level[place]) for level in (nearest, *levels)) for place in places.tolist()}
        return {start + place: rounded_quotient(Fraction(total), divisor) for place, total in exact.items()}


class _Ranges:
    """The flat elements that have a sum, as disjoint ranges in order."""

    def __init__(self) -> None:
        """Have none."""
        self._starts: list[int] = []
        self._ends: list[int] = []

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Cut `[start, end)` into ranges that are here, and ranges none of whose elements is."""
        index = bisect_right(self._ends, start)
        while start < end:
            here = index < len(self._starts) and self._starts[index] <= start
            edge = end if index == len(self._starts) else self._ends[index] if here else self._starts[index]
            yield start, min(edge, end), here
            start, index = edge, index + here

    def add(self, start: int, end: int) -> None:
        """Include `[start, end)`."""
        if start < end:
            first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
            start, end = min([start, *self._starts[first:last]]), max([end, *self._ends[first:last]])
            self._starts[first:last], self._ends[first:last] = [start], [end]


def _divide(
    kernel: Callable[..., Any], arrays: tuple[HostArray, HostArray], start: int, divisor: float, first: int, size: int
) -> None:
    inverse = 1.0 / divisor if significant_bits(divisor) == 1 else 0.0
    kernel(*arrays, start + first, size, divisor, inverse)


def _is_within(number: float) -> bool:
    """Tell whether products and quotients with a number lie well within the range of float64."""
    return _LEAST <= abs(number) <= _MOST


def significant_bits(number: float) -> int:
    """Count the bits of a float64 above 0 from the first to the last that is 1."""
    whole = number.as_integer_ratio()[0]
    return (whole // (whole & -whole)).bit_length()


def rounded_quotient(total: Fraction, divisor: float) -> np.float32:
    """Round a quotient that is not 0 to float32, ties to even."""
    quotient = total / Fraction(divisor)
    exponent = math.frexp(float(quotient))[1]
    quantum = Fraction(2) ** max(exponent - 24, -149)
    with np.errstate(over="ignore"):
        return np.float32(round(quotient / quantum) * float(quantum))
