"""The arrays of one session in host memory, and the calls of kernels on ranges of them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import numpy as np

from stepwire.layout import SCALE_SUFFIX
from stepwire_server.engines.cpu.state_arrays import FlatSlot, HeldRange, Slot
from stepwire_server.engines.cpu.table import read_rows, step_rows
from stepwire_server.engines.cpu.threads import RangeThreads
from stepwire_server.engines.kernel_room import KernelRoom
from stepwire_server.engines.numpy_reference import direction_on_host, gradient_on_host
from stepwire_server.engines.payloads import GradientChunk, check_range, count_of, floats_of
from stepwire_server.engines.protocol import GRAIN, PARAM, Done, EngineState, Gradient, HostArray, Pass, RowPass
from stepwire_server.engines.regions import Region, Table
from stepwire_server.engines.stochastic_rounding import seeds_for
from stepwire_server.rules import ACCUMULATED, Precision, Recipe

__all__ = ["CpuGradient", "CpuKernels", "CpuState"]

# Elements from which a second thread pays. Handing a range to it costs about 60 µs; on one thread an element costs 0.9
# ns to update and 0.17 ns to sum.
LEAST_SHARED_UPDATE = 3 * GRAIN
LEAST_SHARED_SUM = 16 * GRAIN

_START = itemgetter(0)
_NOTHING: Done[None] = Done(None)
_NO_SUMS: Done[tuple[float, ...]] = Done(())


class CpuKernels(Protocol):
    """The interface of `NumbaKernels` and `NumpyKernels`; the former documents it."""

    def bound(self, room: KernelRoom) -> None:
        """Have kernels admitted to a room before they are made."""
        ...

    def source(self, payload: HostArray) -> HostArray:
        """View a chunk of any wire dtype as the kernels read it."""
        ...

    def target(self, out: HostArray) -> HostArray:
        """View an array of any wire dtype as the kernels write it."""
        ...

    def update(self, recipe: Recipe, gradient: np.dtype[Any], reply: np.dtype[Any] | None) -> Callable[..., None]:
        """Return the kernel that steps a range."""
        ...

    def sum_of_squares(self, gradient: np.dtype[Any], accumulated: bool) -> Callable[..., None]:
        """Return the kernel that sums squares in blocks."""
        ...

    def measure(self, recipe: Recipe, gradient: np.dtype[Any]) -> Callable[..., None]:
        """Return the kernel that sums the squares of parameters and direction in blocks."""
        ...

    def accumulate(self, gradient: np.dtype[Any]) -> Callable[..., None]:
        """Return the kernel that adds gradients up."""
        ...

    def exact(self, work: str, gradient: np.dtype[Any] | None = None) -> Callable[..., Any]:
        """Return a kernel of `ExactSum`; totals, levels and errors are float64.

        - `"store"`, of a gradient: `(total, gradient, start, begin, size, factor)` makes `total[start:start + size]`
          `gradient[begin:begin + size] · factor`.
        - `"add"`, of a gradient: `(total, gradient, errors, start, begin, size, factor, block)` adds the products, up
          to the end of the first block of the total in which a sum is inexact. It returns the number of elements that
          are done and leaves the errors of that block in `errors`, `(block,)`. It returns 0 once all sums were exact.
        - `"carry"`: `(level, errors)` adds errors to a level and leaves the errors of that. It returns 1 if there are
          any, plus 2 if the level changed.
        - `"odd"`: `(total, error)` rounds their sum to odd, in the place of the total.
        - `"mean"`: `(total, out, start, size, divisor, inverse)` divides and rounds once, to float32. `inverse` is that
          of the divisor if it is exact, else 0. `out` may lie in the memory of `total`, from the same address on.
        - `"lines"`: `(numbers, width, firsts, counts, columns, totals, inexact)` sums, for each place, a column of
          `counts` lines of `width` finite numbers from line `firsts` on. It rounds each sum to odd, and tells in
          `inexact`, bool, whether that is another number.
        """
        ...

    def rows(self, work: str, gradient: np.dtype[Any] | None = None) -> Callable[..., None]:
        """Return a kernel of `GradientRows`; rows are float32.

        - `"keep"`, of a gradient: `(row, gradient, start, begin, size, factor)` makes `row[start:start + size]`
          `gradient[begin:begin + size] · factor`, without −0.
        - `"sort"`: `(rows, pairs, out, start, rank, size)` sorts the elements `[start, start + size)` of all rows by
          a network. It writes the values from `rank` on to `out`, `(ranks, at least size)`, from the first on.
        """
        ...

    def table(self, recipe: Recipe, reply: np.dtype[Any] | None) -> Callable[..., None]:
        """Return the kernel that steps rows of a table.

        Its arguments are the parameters, the slots, the gradient, `rows`, `kinds`, `scalars`, `out`, `start`, `width`,
        `begin`, `first`, `size` and `sums`.

        It steps the rows `[first, first + size)` of `rows`, those of a table of `width` elements a row that begins at
        `start` of all arrays of the state, which are float32. Their gradients, float32, lie one row after another from
        row `begin` on, and their places in `out` likewise from its beginning. See `RowPass` for the rest. A recipe that
        measures adds to `sums`.
        """
        ...


class _Call(NamedTuple):
    """The call of a kernel that all updates by one recipe have in common.

    Attributes:
        kernel: the kernel that steps a range.
        arrays: the arrays of the state, as arguments of the kernel.
        seeds: the number of its seeds.
        sums: the number of its sums.
    """

    kernel: Callable[..., None]
    arrays: tuple[HostArray, ...]
    seeds: int
    sums: int


class CpuGradient:
    """Chunks as they were received; see `GradientBuffer`."""

    def __init__(self, kernels: CpuKernels) -> None:
        """View chunks as these kernels read them."""
        self._kernels = kernels

    def put(self, offset: int, payload: HostArray, count: int | None = None) -> GradientChunk:
        """See `GradientBuffer.put`; nothing is copied, an unaligned chunk neither."""
        return GradientChunk(payload.dtype, self._kernels.source(payload), count_of(payload, count))

    def close(self) -> None:
        """See `GradientBuffer.close`."""


class CpuState:
    """The arrays of one session; see `EngineState`."""

    def __init__(
        self, kernels: CpuKernels, threads: RangeThreads, slots: dict[str, Slot], size: int, regions: Sequence[Region]
    ) -> None:
        """Own zeroed slots of `size` elements from now on; `regions` are those of a rule's slots, if they have any."""
        self._kernels = kernels
        self._threads = threads
        self._slots = slots
        self._size = size
        self._regions = regions
        # A step calls the same few kernels with the same arrays as the one before.
        self._calls: dict[tuple[Recipe, np.dtype[Any], np.dtype[Any] | None, Region | None], _Call] = {}

    @property
    def nbytes(self) -> int:
        """See `EngineState.nbytes`."""
        return sum(slot.nbytes for slot in self._slots.values())

    @property
    def depth(self) -> int:
        """See `EngineState.depth`: what is asked for is done at once."""
        return 1

    def receive(self, size: int | None = None) -> CpuGradient:
        """See `EngineState.receive`."""
        return CpuGradient(self._kernels)

    def sum_of_squares(
        self, gradient: Gradient, begin: int, end: int, factor: float, accumulated: int | None = None
    ) -> Done[float]:
        """See `EngineState.sum_of_squares`; the same bits with any number of threads."""
        chunk = self._checked(gradient, begin, end, accumulated)
        kernel = self._kernels.sum_of_squares(chunk.dtype, accumulated is not None)
        arrays = () if accumulated is None else self._slots[ACCUMULATED].held(0).arrays
        (total,) = self._sums(1, kernel, (*arrays, chunk.values, accumulated or 0, begin), end - begin, (factor,))
        return Done(total)

    def accumulate(self, start: int, gradient: Gradient, begin: int, end: int, factor: float) -> None:
        """See `EngineState.accumulate`."""
        chunk = self._checked(gradient, begin, end, start)
        kernel, arrays = self._kernels.accumulate(chunk.dtype), self._slots[ACCUMULATED].held(0).arrays

        def work(first: int, size: int) -> None:
            kernel(*arrays, chunk.values, start + first, begin + first, size, factor)

        self._threads.run(work, end - begin, LEAST_SHARED_UPDATE)

    def measure(self, step: Pass, start: int, gradient: Gradient, begin: int, end: int) -> Done[tuple[float, float]]:
        """See `EngineState.measure`; the same bits with any number of threads."""
        chunk = self._checked(gradient, begin, end, start)
        at, region = self._region(start, end - begin)
        recipe, arrays = self._arrays(step.recipe, region)
        kernel = self._kernels.measure(recipe, chunk.dtype)
        param, direction = self._sums(2, kernel, (*arrays, chunk.values, at, begin), end - begin, step.scalars[:-1])
        return Done((param, direction))

    def fetch(
        self, gradient: Gradient, begin: int, end: int, factor: float, accumulated: int | None = None
    ) -> HostArray:
        """See `EngineState.fetch`."""
        chunk = self._checked(gradient, begin, end, accumulated)
        before = None if accumulated is None else self._read(ACCUMULATED, accumulated, end - begin)
        return gradient_on_host(_floats(chunk, begin, end), factor, before)

    def fetch_direction(self, step: Pass, start: int, gradient: Gradient, begin: int, end: int) -> HostArray:
        """See `EngineState.fetch_direction`."""
        chunk = self._checked(gradient, begin, end, start)
        return direction_on_host(step, _floats(chunk, begin, end), lambda slot: self._read(slot, start, end - begin))

    def update(
        self,
        step: Pass,
        start: int,
        gradient: Gradient,
        begin: int,
        end: int,
        out: HostArray | None,
    ) -> Done[tuple[float, ...]]:
        """See `EngineState.update`."""
        chunk, count = self._checked(gradient, begin, end, start), end - begin
        target = None
        if out is not None:
            check_range("out", 0, count, len(out))
            target = self._kernels.target(out)
        at, (kernel, arrays, seeded, summed) = self._call(step.recipe, chunk.dtype, out, start, count)
        seeds = seeds_for(step.seed, seeded) if seeded else ()
        if not summed:

            def work(first: int, size: int) -> None:
                kernel(*arrays, chunk.values, target, at + first, begin + first, first, size, *seeds, *step.scalars)

            self._threads.run(work, count, LEAST_SHARED_UPDATE)
            return _NO_SUMS
        most = count or 1 if count < LEAST_SHARED_UPDATE else self._threads.range_size(count)
        sums = np.zeros((-(-count // most) or 1, summed))

        def measured_work(first: int, size: int) -> None:
            offsets = (at + first, begin + first, first, size)
            kernel(*arrays, chunk.values, target, *offsets, sums[first // most], *seeds, *step.scalars)

        self._threads.run(measured_work, count, LEAST_SHARED_UPDATE)
        return Done(tuple((sums[0] if most >= count else sums.sum(axis=0)).tolist()))

    def update_rows(
        self, step: RowPass, table: Table, rows: HostArray, gradient: Gradient, begin: int, out: HostArray | None
    ) -> Done[tuple[float, ...]]:
        """See `EngineState.update_rows`."""
        chunk = self._checked(gradient, begin * table.width, (begin + len(rows)) * table.width, None)
        at, region = self._region(table.start, table.elements)
        recipe, arrays = self._arrays(step.recipe, region)
        kernel = self._kernels.table(recipe, None if out is None else out.dtype)
        target = None if out is None else self._kernels.target(out)
        before = (*arrays, chunk.values, rows, step.kinds, step.scalars, target, at, table.width, begin)
        return Done(step_rows(kernel, before, table, rows, len(recipe.sums), self._threads))

    def read_rows(self, slot: str, table: Table, rows: HostArray, out: HostArray) -> Done[None]:
        """See `EngineState.read_rows`."""
        held = self._slots[slot].held(table.start)
        read_rows(held.cut(table.elements)[0], table, rows, out)
        return _NOTHING

    def read(self, slot: str, start: int, out: HostArray) -> Done[None]:
        """See `EngineState.read`."""
        check_range("state", start, start + len(out), self._size)
        if slot in self._slots:
            self._slots[slot].read(start, out)
        else:
            self._slots[slot.removesuffix(SCALE_SUFFIX)].read_scale(start, out)
        return _NOTHING

    def write(self, slot: str, start: int, values: HostArray) -> None:
        """See `EngineState.write`."""
        check_range("state", start, start + len(values), self._size)
        self._slots[slot].write(start, values)

    def copy(self, source: str, target: str) -> None:
        """See `EngineState.copy`."""
        self._slots[target].write(0, self._slots[source].held(0).arrays[0])

    def clear(self, slot: str) -> None:
        """See `EngineState.clear`."""
        self._slots[slot].held(0).arrays[0][:] = 0.0

    def adopt(self, other: EngineState) -> None:
        """See `EngineState.adopt`."""
        assert isinstance(other, CpuState) and other._size == self._size
        self._calls.clear()
        staged = {name: slot.held(0).arrays[0] for name, slot in other._slots.items()}
        for name, own in self._slots.items():
            if name not in staged:
                continue
            if isinstance(own, FlatSlot) and not own.moved and own.values.dtype == staged[name].dtype:
                self._slots[name] = other._slots[name]
            else:
                own.replace(0, staged[name], staged.get(name + SCALE_SUFFIX))
        other.close()

    def move(self, slot: str, memory: HostArray) -> bool:
        """See `EngineState.move`."""
        held = self._slots[slot]
        assert isinstance(held, FlatSlot)
        self._calls.clear()
        held.move(memory)
        return True

    def yield_buffers(self, gradient: Gradient | None) -> None:
        """See `EngineState.yield_buffers`: nothing is shared."""

    def lane_arrays(self, recipe: Recipe) -> tuple[Recipe, tuple[HostArray, ...]] | None:
        """Return the arrays that an update has, and the recipe for how they are held; None where regions differ."""
        return None if self._regions else self._arrays(recipe, None)

    def settle(self) -> None:
        """See `EngineState.settle`."""

    def close(self) -> None:
        """See `EngineState.close`."""
        self._slots = {}
        self._calls.clear()
        self._size = 0

    def _checked(self, gradient: Gradient, begin: int, end: int, start: int | None) -> GradientChunk:
        assert isinstance(gradient, GradientChunk)
        if not 0 <= begin <= end <= gradient.count:
            check_range("gradient", begin, end, gradient.count)
        if start is not None and not 0 <= start <= self._size + begin - end:
            check_range("state", start, start + end - begin, self._size)
        return gradient

    def _call(
        self, recipe: Recipe, gradient: np.dtype[Any], out: HostArray | None, start: int, size: int
    ) -> tuple[int, _Call]:
        """Return how to step a range, and where in the arrays it starts."""
        at, region = self._region(start, size)
        key = (recipe, gradient, None if out is None else out.dtype, region)
        if (call := self._calls.get(key)) is None:
            held, arrays = self._arrays(recipe, region)
            seeds = len(held.rule.slots) if held.precision is Precision.BFLOAT16 else 0
            call = self._calls[key] = _Call(self._kernels.update(held, gradient, key[2]), arrays, seeds, len(held.sums))
        return at, call

    def _region(self, start: int, size: int) -> tuple[int, Region | None]:
        """Return where a range starts in its region, and the region; None where all is held alike."""
        if not self._regions:
            return start, None
        region = self._regions[bisect_right(self._regions, start, key=_START) - 1]
        if not region.start <= start <= start + size <= region.end:
            raise IndexError(f"no region holds elements [{start}, {start + size})")
        return start - region.start, region

    def _arrays(self, recipe: Recipe, region: Region | None) -> tuple[Recipe, tuple[HostArray, ...]]:
        """Return the arrays of a region, or of all, and the recipe for how they are held."""
        start, end = (0, self._size) if region is None else (region.start, region.end)
        ranges = [self._slots[slot].held(start) for slot in (PARAM, *recipe.slots)]
        held = recipe.held(_precision_of(recipe, ranges))
        return held, tuple(array for each in ranges for array in each.cut(end - start))

    def _sums(
        self,
        count: int,
        kernel: Callable[..., None],
        before: tuple[Any, ...],
        size: int,
        scalars: tuple[float, ...],
    ) -> tuple[float, ...]:
        partials = np.zeros((count, -(-size // GRAIN)))

        def work(first: int, elements: int) -> None:
            kernel(*before, first, elements, GRAIN, partials, *scalars)

        self._threads.run(work, size, LEAST_SHARED_SUM)
        return tuple(map(math.fsum, partials.tolist()))

    def _read(self, slot: str, start: int, size: int) -> HostArray:
        values = np.empty(size, np.float32)
        self._slots[slot].read(start, values)
        return values


def _precision_of(recipe: Recipe, ranges: Sequence[HeldRange]) -> Precision:
    """Return the precision of a rule's slots in a range, which come after the parameters."""
    return ranges[1].precision if recipe.rule.slots else Precision.FLOAT32


def _floats(chunk: GradientChunk, begin: int, end: int) -> HostArray:
    return floats_of(chunk.values.view(chunk.dtype), begin, end)
