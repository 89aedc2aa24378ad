"""The arrays of one session in GPU memory, and the calls of kernels on ranges of them. Unverified on a GPU.

All kernels go through the stream `compute`, and nothing else writes to state. So calls are carried out in their order,
and a kernel finds all that it reads.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from stepwire.errors import DataLossError
from stepwire.layout import SCALE_SUFFIX
from stepwire.wire.int8_blocks import BLOCK, INT8
from stepwire_server.engines.cuda.bus import Crossings
from stepwire_server.engines.cuda.gradient import CudaChunk, CudaGradient
from stepwire_server.engines.cuda.ipc_memory import DeviceArray, OnDevice
from stepwire_server.engines.cuda.kernels import LANE_ELEMENTS, grains, head_of, launch
from stepwire_server.engines.cuda.resources import CudaResources, Together
from stepwire_server.engines.cuda.state_arrays import CudaFlatSlot, CudaSlot
from stepwire_server.engines.cuda.state_copies import (
    bring_bytes,
    bring_values,
    encode,
    read_scale,
    read_slot,
    replace_slot,
    write_slot,
)
from stepwire_server.engines.cuda.sums import CELL_BYTES, Figures, UnreadFigures
from stepwire_server.engines.numpy_reference import direction_on_host, gradient_on_host, measured_slots
from stepwire_server.engines.payloads import STORED, bits_of, check_range, floats_of, name_of
from stepwire_server.engines.protocol import GRAIN, PARAM, Done, EngineState, Gradient, HostArray, Pass, Pending
from stepwire_server.engines.stochastic_rounding import seeds_for
from stepwire_server.rules import ACCUMULATED, Precision, Recipe

__all__ = ["CudaState"]

_PARTIALS = CELL_BYTES // 8
_UNREAD_SUMS = 8


class _DeviceReply(NamedTuple):
    """The place of a range's new parameters in memory of the device.

    Attributes:
        dtype: the wire dtype.
        memory: `(n,)` as kernels write it.
    """

    dtype: np.dtype[Any]
    memory: Any


class _SummingCall(NamedTuple):
    """A kernel that leaves a sum for each block of elements.

    Attributes:
        kernel: the kernel.
        rows: the number of sums for each block.
        numbers: the arguments after the size.
        tables: the tables of 8 bits, where the kernel reads them.
    """

    kernel: Any
    rows: int
    numbers: Sequence[Any]
    tables: Sequence[Any] = ()


class CudaState:
    """The arrays of one session; see `EngineState`. Unverified on a GPU."""

    def __init__(self, resources: CudaResources, memory: Any, slots: dict[str, CudaSlot], size: int) -> None:
        """Own slots of `size` elements that lie in `memory` from now on."""
        self._resources = resources
        self._memory = memory
        self._slots = slots
        self._size = size
        self._unread = UnreadFigures(_UNREAD_SUMS)
        self._settled = resources.device.event()
        self._crossings = Crossings(resources.bus)

    @property
    def nbytes(self) -> int:
        """See `EngineState.nbytes`."""
        return 0 if self._memory is None else int(self._memory.nbytes)

    @property
    def depth(self) -> int:
        """See `EngineState.depth`: one reply is computed, one crosses the bus, one is copied, one is in reserve."""
        return self._resources.bus.buffers

    def receive(self) -> CudaGradient:
        """See `EngineState.receive`."""
        return CudaGradient(self._resources.device, self._resources.bus, self._resources.gradients, self._size)

    # --- the calls of a step ----------------------------------------------------------------------------

    def sum_of_squares(
        self, gradient: Gradient, begin: int, end: int, factor: float, accumulated: int | None = None
    ) -> Pending[float]:
        """See `EngineState.sum_of_squares`; the same bits as on the CPU."""
        chunk = self._checked(gradient, begin, end, accumulated)
        kind = "sum" if accumulated is None else "sum_accumulated"
        kernel = self._resources.kernels.of_gradients(f"{kind}_{name_of(chunk.dtype)}")
        asked = []
        for low, high in _cut(end - begin, _PARTIALS * GRAIN):
            window, place = chunk.window(begin + low, begin + high)
            arrays = [window]
            if accumulated is not None:
                arrays = [*self._slots[ACCUMULATED].held(accumulated + low, high - low).arrays, *arrays]
            numbers = [*place, np.float32(factor)]
            asked.append(self._partials(_SummingCall(kernel, 1, numbers), arrays, high - low, chunk.gradient.unread))
        return Together(asked, lambda rows: math.fsum(itertools.chain(*(row for (row,) in rows))))

    def accumulate(self, start: int, gradient: Gradient, begin: int, end: int, factor: float) -> None:
        """See `EngineState.accumulate`."""
        chunk, size = self._checked(gradient, begin, end, start), end - begin
        if size:
            kernel = self._resources.kernels.of_gradients(f"accumulate_{name_of(chunk.dtype)}")
            window, place = chunk.window(begin, end)
            arrays = [*self._slots[ACCUMULATED].held(start, size).arrays, window]
            numbers = [np.int64(size), np.int64(head_of(arrays, size)), *place, np.float32(factor)]
            with self._resources.device.computing():
                launch(kernel, self._resources.kernels.blocks(size), *arrays, *numbers)

    def measure(self, step: Pass, start: int, gradient: Gradient, begin: int, end: int) -> Pending[tuple[float, float]]:
        """See `EngineState.measure`; the same bits as on the CPU."""
        chunk, asked = self._checked(gradient, begin, end, start), []
        for low, high in _cut(end - begin, _PARTIALS // 2 * GRAIN):
            slots = (PARAM, *measured_slots(step.recipe))
            recipe, arrays = self._arrays(step.recipe, slots, start + low, high - low)
            kernel = self._resources.kernels.measure(recipe, chunk.dtype)
            window, place = chunk.window(begin + low, begin + high)
            numbers, tables = [*place, *map(np.float32, step.scalars[:-1])], self._tables(recipe)
            call = _SummingCall(kernel, 2, numbers, tables)
            asked.append(self._partials(call, [*arrays, window], high - low, self._unread))
        return Together(asked, _two_sums)

    def update(
        self,
        step: Pass,
        start: int,
        gradient: Gradient,
        begin: int,
        end: int,
        out: HostArray | None,
    ) -> Pending[tuple[float, ...]]:
        """See `EngineState.update`."""
        chunk, size = self._checked(gradient, begin, end, start), end - begin
        if size == 0:
            return Done((0.0,) * len(step.recipe.sums))
        if out is None:
            return self._step(step, start, chunk, begin, end, None)
        check_range("reply", 0, size, len(out))
        if isinstance(out, DeviceArray):
            moved = self._step(step, start, chunk, begin, end, _DeviceReply(out.dtype, out.stored))
            return moved if step.recipe.sums else Together([OnDevice(self)], lambda _: ())
        asked = []
        for low, high in _cut(size, self._most_elements(out)):
            asked += self._replied(step, start + low, chunk, begin + low, begin + high, out[low:high])
        return Together(asked, lambda sums: tuple(map(math.fsum, zip(*filter(None, sums), strict=True))))

    def _replied(
        self, step: Pass, start: int, chunk: CudaChunk, begin: int, end: int, out: HostArray
    ) -> list[Pending[Any]]:
        """Step a range that a buffer of the bus holds, and bring the new parameters to the host."""
        moved: list[Pending[Any]] = []

        def make(memory: Any) -> None:
            reply = _DeviceReply(out.dtype, memory.view(STORED[out.dtype]))
            moved.append(self._step(step, start, chunk, begin, end, reply))

        shift = start % LANE_ELEMENTS * out.dtype.itemsize
        crossing = self._crossings.bring(shift, make, bits_of(out).view(np.uint8))
        return [crossing, *moved]

    def _step(
        self, step: Pass, start: int, chunk: CudaChunk, begin: int, end: int, reply: _DeviceReply | None
    ) -> Pending[tuple[float, ...]]:
        """Run the fused kernel once."""
        size, kernels = end - begin, self._resources.kernels
        recipe, arrays = self._arrays(step.recipe, (PARAM, *step.recipe.slots), start, size)
        window, place = chunk.window(begin, end)
        arrays += [window, *([] if reply is None else [reply.memory])]
        kernel = kernels.update(recipe, chunk.dtype, None if reply is None else reply.dtype)
        in_blocks = recipe.precision is Precision.INT8
        seeds = seeds_for(step.seed, len(recipe.rule.slots)) if recipe.precision is Precision.BFLOAT16 else ()
        head = 0 if in_blocks else head_of(arrays, size)
        numbers = (np.int64(size), np.int64(head), *place, *map(np.uint32, seeds), *map(np.float32, step.scalars))
        blocks, rows = kernels.blocks_of(recipe, size), len(recipe.sums)
        tables = self._tables(recipe)
        with self._resources.device.computing():
            if not rows:
                launch(kernel, blocks, *arrays, *tables, *numbers)
                return Done(())
            return Figures(
                self._resources.cells,
                self._unread,
                blocks * rows,
                np.float64,
                lambda sums: launch(kernel, blocks, *arrays, sums, *tables, *numbers),
                lambda sums: tuple(sums.reshape(rows, -1).sum(axis=1).tolist()),
            )

    # --- rare calls, computed on the host --------------------------------------------------

    def fetch(
        self, gradient: Gradient, begin: int, end: int, factor: float, accumulated: int | None = None
    ) -> HostArray:
        """See `EngineState.fetch`."""
        chunk = self._checked(gradient, begin, end, accumulated)
        before = None if accumulated is None else self._fetched(ACCUMULATED, accumulated, end - begin)
        return gradient_on_host(self._floats(chunk, begin, end), factor, before)

    def fetch_direction(self, step: Pass, start: int, gradient: Gradient, begin: int, end: int) -> HostArray:
        """See `EngineState.fetch_direction`."""
        chunk, size = self._checked(gradient, begin, end, start), end - begin
        return direction_on_host(step, self._floats(chunk, begin, end), lambda slot: self._fetched(slot, start, size))

    # --- state in and out --------------------------------------------------------------------------------

    def read(self, slot: str, start: int, out: HostArray) -> Pending[None]:
        """See `EngineState.read`."""
        check_range("state", start, start + len(out), self._size)
        if isinstance(out, DeviceArray):
            self._encode(slot, start, out)
            return OnDevice(self)
        if slot not in self._slots:
            owner = self._slots[slot.removesuffix(SCALE_SUFFIX)]
            return read_scale(self._resources, self._crossings, owner, start, out)
        return read_slot(self._resources, self._crossings, self._slots[slot], start, out)

    def _encode(self, slot: str, start: int, out: DeviceArray) -> None:
        """Encode a range of a slot that is not held in 8 bits into memory of the device."""
        held = self._slots[slot]
        assert isinstance(held, CudaFlatSlot)
        with self._resources.device.computing():
            encode(self._resources, held.values[start : start + len(out)], held.dtype, out)

    def write(self, slot: str, start: int, values: HostArray) -> None:
        """See `EngineState.write`; bfloat16 rounds to nearest even."""
        check_range("state", start, start + len(values), self._size)
        write_slot(self._resources, self._slots[slot], start, values)

    def copy(self, source: str, target: str) -> None:
        """See `EngineState.copy`."""
        (values,), (copies,) = (self._slots[name].held(0, self._size).arrays for name in (source, target))
        with self._resources.device.current():
            copies.data.copy_from_device_async(values.data, values.nbytes, self._resources.device.compute)

    def clear(self, slot: str) -> None:
        """See `EngineState.clear`."""
        (values,) = self._slots[slot].held(0, self._size).arrays
        with self._resources.device.current():
            values.data.memset_async(0, values.nbytes, self._resources.device.compute)

    def adopt(self, other: EngineState) -> None:
        """See `EngineState.adopt`."""
        assert isinstance(other, CudaState) and other._size == self._size
        for name, slot in self._slots.items():
            if name in other._slots:
                replace_slot(self._resources, slot, other._slots[name], other._slots.get(name + SCALE_SUFFIX))
        other.close()

    # --- end ---------------------------------------------------------------------------------------------

    def move(self, slot: str, memory: HostArray) -> bool:
        """See `EngineState.move`: slots lie in the memory of the device."""
        return False

    def settle(self) -> None:
        """See `EngineState.settle`."""
        self._unread.clear()
        with self._resources.device.current():
            self._settled.record(self._resources.device.compute)
        self._resources.device.wait(self._settled)

    def close(self) -> None:
        """See `EngineState.close`; memory is zeroed before it goes back to the device."""
        memory, self._memory, self._slots, self._size = self._memory, None, {}, 0
        if memory is None:
            return
        with contextlib.suppress(DataLossError):  # nothing reads the memory of a device that is lost
            with contextlib.ExitStack() as parts:
                parts.callback(self.settle)
                parts.callback(self._crossings.clear)
                self._resources.device.zero(memory)

    # --- helpers -----------------------------------------------------------------------------------------

    def _checked(self, gradient: Gradient, begin: int, end: int, start: int | None) -> CudaChunk:
        assert isinstance(gradient, CudaChunk)
        check_range("gradient", begin, end, len(gradient))
        if start is not None:
            check_range("state", start, start + end - begin, self._size)
        return gradient

    def _arrays(self, recipe: Recipe, slots: Sequence[str], start: int, size: int) -> tuple[Recipe, list[Any]]:
        """Return the recipe for how a range is held, and the range as arguments of kernels."""
        ranges = {slot: self._slots[slot].held(start, size) for slot in slots}
        held = recipe
        for slot in recipe.rule.slots[:1]:  # the others are held alike
            held = recipe.held(ranges[slot].precision)
        return held, [array for each in ranges.values() for array in each.arrays]

    def _partials(
        self, call: _SummingCall, arrays: Sequence[Any], size: int, unread: UnreadFigures
    ) -> Figures[list[list[float]]]:
        """Run a kernel that leaves sums for each block of elements; the results are rows of those."""
        kernel, rows, numbers, tables = call
        blocks = grains(size)
        with self._resources.device.computing():
            return Figures(
                self._resources.cells,
                unread,
                rows * blocks,
                np.float64,
                lambda sums: launch(kernel, blocks, *arrays, sums, *tables, np.int64(size), *numbers),
                lambda sums: sums.reshape(rows, blocks).tolist(),
            )

    def _tables(self, recipe: Recipe) -> list[Any]:
        return [self._resources.tables] if recipe.precision is Precision.INT8 else []

    def _most_elements(self, out: HostArray) -> int:
        """Return the elements of a reply that a buffer of the bus holds, wherever they start."""
        return (self._resources.bus.buffer_bytes // out.dtype.itemsize - LANE_ELEMENTS) // BLOCK * BLOCK

    def _floats(self, chunk: CudaChunk, begin: int, end: int) -> HostArray:
        if chunk.dtype == INT8:
            first, last = begin // BLOCK, -(-end // BLOCK)
            blocks = np.empty(last - first, INT8)
            memory = chunk.values[first * INT8.itemsize : last * INT8.itemsize]
            bring_bytes(self._resources, self._crossings, memory, bits_of(blocks)).wait()
            return floats_of(blocks, begin - first * BLOCK, end - first * BLOCK)
        values = np.empty(end - begin, chunk.dtype)
        bring_values(self._resources, self._crossings, chunk.values[begin:end], chunk.dtype, values).wait()
        return floats_of(values, 0, end - begin)

    def _fetched(self, slot: str, start: int, size: int) -> HostArray:
        values = np.empty(size, np.float32)
        self.read(slot, start, values).wait()
        return values


def _two_sums(sums: list[list[list[float]]]) -> tuple[float, float]:
    first, second = (math.fsum(itertools.chain(*(each[row] for each in sums))) for row in (0, 1))
    return first, second


def _cut(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut `[0, size)` into ranges of at most `most` elements."""
    return ((low, min(low + most, size)) for low in range(0, size, most))
