"""The arrays of one session in GPU memory, and the calls of kernels on ranges of them. Unverified on a GPU.

All kernels go through the stream `compute`, and nothing else writes to state. So calls are carried out in their order,
and a kernel finds all that it reads.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from stepwire.errors import DataLossError
from stepwire.layout import SCALE_SUFFIX
from stepwire.wire.int8_blocks import BLOCK, INT8
from stepwire_server.engines.cuda.bus import Crossings
from stepwire_server.engines.cuda.calls import UpdateCall
from stepwire_server.engines.cuda.gradient import CudaChunk, CudaGradient
from stepwire_server.engines.cuda.ipc_memory import DeviceArray, OnDevice
from stepwire_server.engines.cuda.kernels import LANE_ELEMENTS, CudaKernel, grains, head_of
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
from stepwire_server.engines.cuda.sums import (
    CELL_BYTES,
    Figures,
    RepliedSums,
    UnreadFigures,
    listed,
    two_rows,
    two_sums,
)
from stepwire_server.engines.cuda.table import TableCalls
from stepwire_server.engines.numpy_reference import direction_on_host, gradient_on_host, measured_slots
from stepwire_server.engines.payloads import check_range, cut, floats_of, name_of
from stepwire_server.engines.protocol import (
    GRAIN,
    PARAM,
    Done,
    EngineState,
    Gradient,
    HostArray,
    Pass,
    Pending,
    RowPass,
)
from stepwire_server.engines.regions import Table
from stepwire_server.rules import ACCUMULATED, Precision, Recipe

__all__ = ["CudaState"]

_PARTIALS = CELL_BYTES // 8
_UNREAD_SUMS = 8
_NO_SUMS: Done[tuple[float, ...]] = Done(())

Value = TypeVar("Value")


class _SummingCall(NamedTuple):
    """A kernel that leaves a sum for each block of elements.

    Attributes:
        kernel: the kernel.
        rows: the number of sums for each block.
        numbers: the arguments after the size.
        tables: the address of the tables of 8 bits, where the kernel reads them.
    """

    kernel: CudaKernel
    rows: int
    numbers: Sequence[Any]
    tables: Sequence[int] = ()


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
        self._call: UpdateCall | None = None
        self._crossings = Crossings(resources.bus)
        self._tables = TableCalls(resources, self._crossings, self._unread)

    @property
    def nbytes(self) -> int:
        """See `EngineState.nbytes`."""
        return 0 if self._memory is None else int(self._memory.nbytes)

    @property
    def depth(self) -> int:
        """See `EngineState.depth`: one reply is computed, one crosses the bus, one is copied, one is in reserve."""
        return self._resources.bus.buffers

    def receive(self, size: int | None = None) -> CudaGradient:
        """See `EngineState.receive`."""
        elements = self._size if size is None else size
        return CudaGradient(self._resources.device, self._resources.bus, self._resources.gradients, elements)

    # --- the calls of a step ----------------------------------------------------------------------------

    def sum_of_squares(
        self, gradient: Gradient, begin: int, end: int, factor: float, accumulated: int | None = None
    ) -> Pending[float]:
        """See `EngineState.sum_of_squares`; the same bits as on the CPU."""
        chunk = self._checked(gradient, begin, end, accumulated)
        kernel = self._resources.kernels.sum(chunk.dtype, accumulated is not None)
        asked = []
        for low, high in cut(end - begin, _PARTIALS * GRAIN):
            address, place = chunk.window(begin + low)
            addresses = [address]
            if accumulated is not None:
                addresses = [*self._slots[ACCUMULATED].held(accumulated + low, high - low).addresses, address]
            call = _SummingCall(kernel, 1, (*place, np.float32(factor)))
            asked.append(self._partials(call, addresses, high - low, chunk.gradient.unread, listed))
        return Together(asked, lambda parts: math.fsum(itertools.chain(*parts)))

    def accumulate(self, start: int, gradient: Gradient, begin: int, end: int, factor: float) -> None:
        """See `EngineState.accumulate`."""
        chunk, size = self._checked(gradient, begin, end, start), end - begin
        if size:
            kernel = self._resources.kernels.of_gradients(f"accumulate_{name_of(chunk.dtype)}")
            address, place = chunk.window(begin)
            addresses = [*self._slots[ACCUMULATED].held(start, size).addresses, address]
            head = head_of(addresses, (4, 1 if place else chunk.dtype.itemsize), size)
            with self._resources.device.current():
                kernel.launch(kernel.blocks(size), (*addresses, size, head, *place, np.float32(factor)))

    def measure(self, step: Pass, start: int, gradient: Gradient, begin: int, end: int) -> Pending[tuple[float, float]]:
        """See `EngineState.measure`; the same bits as on the CPU."""
        chunk, asked = self._checked(gradient, begin, end, start), []
        for low, high in cut(end - begin, _PARTIALS // 2 * GRAIN):
            slots = (PARAM, *measured_slots(step.recipe))
            precision, addresses = self._held(step.recipe, slots, start + low, high - low)
            recipe = step.recipe if precision is None else step.recipe.held(precision)
            kernel = self._resources.kernels.measure(recipe, chunk.dtype)
            address, place = chunk.window(begin + low)
            tables = (self._resources.tables_address,) if recipe.precision is Precision.INT8 else ()
            call = _SummingCall(kernel, 2, (*place, *map(np.float32, step.scalars[:-1])), tables)
            asked.append(self._partials(call, [*addresses, address], high - low, self._unread, two_rows))
        return Together(asked, two_sums)

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
            moved = self._step(step, start, chunk, begin, end, (out.dtype, out.address))
            return moved if step.recipe.sums else Together([OnDevice(self)], lambda _: ())
        shift = start % LANE_ELEMENTS * out.dtype.itemsize
        if (most := self._most_elements(shift, out.dtype.itemsize)) >= size:
            return self._replied(step, start, chunk, begin, end, out)
        asked = [
            self._replied(step, start + low, chunk, begin + low, begin + high, out[low:high])
            for low, high in cut(size, most)
        ]
        return Together(asked, lambda sums: tuple(map(math.fsum, zip(*sums, strict=True))))

    def _replied(
        self, step: Pass, start: int, chunk: CudaChunk, begin: int, end: int, out: HostArray
    ) -> Pending[tuple[float, ...]]:
        """Step a range that a buffer of the bus holds, and bring the new parameters to the host."""
        moved: Pending[tuple[float, ...]] = _NO_SUMS

        def make(place: int) -> None:
            nonlocal moved
            moved = self._step(step, start, chunk, begin, end, (out.dtype, place))

        return RepliedSums(self._crossings.bring(start % LANE_ELEMENTS * out.dtype.itemsize, make, out), moved)

    def _step(
        self, step: Pass, start: int, chunk: CudaChunk, begin: int, end: int, reply: tuple[np.dtype[Any], int] | None
    ) -> Pending[tuple[float, ...]]:
        """Run the fused kernel once.

        Args:
            step: the arithmetic.
            start: the first flat element.
            chunk: the gradient.
            begin: the first element within the chunk.
            end: one past the last element within the chunk.
            reply: the dtype and the address on the device of the new parameters; None for no reply.
        """
        size, dtype = end - begin, None if reply is None else reply[0]
        precision, addresses = self._held(step.recipe, (PARAM, *step.recipe.slots), start, size)
        if (call := self._call) is None or not call.serves(step, precision, chunk.dtype, dtype):
            self._call = call = UpdateCall(self._resources, step, precision, chunk.dtype, dtype)
        address, place = chunk.window(begin)
        addresses += [address] if reply is None else [address, reply[1]]
        with self._resources.device.current():
            if not (rows := call.rows):
                call.launch(addresses, place, size)
                return _NO_SUMS
            return Figures(
                self._resources.cells,
                self._unread,
                lambda sums: call.launch(addresses, place, size, (sums,)),
                lambda sums: tuple(sums.reshape(rows, -1).sum(axis=1).tolist()),
                call.blocks(size) * rows,
            )

    def update_rows(
        self, step: RowPass, table: Table, rows: HostArray, gradient: Gradient, begin: int, out: HostArray | None
    ) -> Pending[tuple[float, ...]]:
        """See `EngineState.update_rows`."""
        if not rows.size:
            return Done((0.0,) * len(step.recipe.sums))
        chunk = self._checked(gradient, begin * table.width, (begin + len(rows)) * table.width, None)
        _, addresses = self._held(step.recipe, (PARAM, *step.recipe.slots), table.start, table.elements)
        address, _ = chunk.window(begin * table.width)
        return self._tables.step(step, addresses, table, rows, address, out)

    def read_rows(self, slot: str, table: Table, rows: HostArray, out: HostArray) -> Pending[None]:
        """See `EngineState.read_rows`."""
        (source,) = self._slots[slot].held(table.start, table.elements).addresses
        return self._tables.read(source, table, rows, out)

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
        with self._resources.device.current():
            encode(self._resources, held.address_of(start), held.dtype, out)

    def write(self, slot: str, start: int, values: HostArray) -> None:
        """See `EngineState.write`; bfloat16 rounds to nearest even."""
        check_range("state", start, start + len(values), self._size)
        write_slot(self._resources, self._slots[slot], start, values)

    def copy(self, source: str, target: str) -> None:
        """See `EngineState.copy`."""
        held, copied = self._slots[source], self._slots[target]
        assert isinstance(held, CudaFlatSlot) and isinstance(copied, CudaFlatSlot)
        with self._resources.device.current():
            self._resources.device.copy_across(copied.address_of(0), held.address_of(0), held.values.nbytes)

    def clear(self, slot: str) -> None:
        """See `EngineState.clear`."""
        held = self._slots[slot]
        assert isinstance(held, CudaFlatSlot)
        self._resources.device.zero(held.values)

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

    def yield_buffers(self, gradient: Gradient | None) -> None:
        """See `EngineState.yield_buffers`: buffers of the bus, and cells of sums."""
        self._crossings.arrive()
        self._unread.clear()
        if isinstance(gradient, CudaChunk):
            gradient.gradient.unread.clear()

    def settle(self) -> None:
        """See `EngineState.settle`."""
        self._unread.clear()
        with self._resources.device.current():
            self._settled.record(self._resources.device.compute)
        self._resources.device.wait(self._settled)

    def close(self) -> None:
        """See `EngineState.close`; memory is zeroed before it goes back to the device."""
        memory, self._memory, self._slots, self._size, self._call = self._memory, None, {}, 0, None
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

    def _held(self, recipe: Recipe, slots: Iterable[str], start: int, size: int) -> tuple[Precision | None, list[int]]:
        """Return the precision of a range's moments, which are held alike, and the addresses of the range."""
        precision: Precision | None = None
        addresses: list[int] = []
        first = recipe.rule.slots[0] if recipe.rule.slots else None
        for slot in slots:
            held = self._slots[slot].held(start, size)
            addresses += held.addresses
            if slot == first:
                precision = held.precision
        return precision, addresses

    def _partials(
        self,
        call: _SummingCall,
        addresses: Sequence[int],
        size: int,
        unread: UnreadFigures,
        read: Callable[[HostArray], Value],
    ) -> Figures[Value]:
        """Run a kernel that leaves sums for each block of elements, one row after another, and `read` makes of them."""
        kernel, rows, numbers, tables = call
        blocks = grains(size)
        with self._resources.device.current():
            return Figures(
                self._resources.cells,
                unread,
                lambda sums: kernel.launch(blocks, (*addresses, sums, *tables, size, *numbers)),
                read,
                rows * blocks,
            )

    def _most_elements(self, shift: int, itemsize: int) -> int:
        """Return the elements of a reply that a buffer of the bus holds from byte `shift` on."""
        return (self._resources.bus.buffer_bytes - shift) // itemsize // BLOCK * BLOCK

    def _floats(self, chunk: CudaChunk, begin: int, end: int) -> HostArray:
        if chunk.dtype == INT8:
            first, last = begin // BLOCK, -(-end // BLOCK)
            blocks = np.empty(last - first, INT8)
            source = chunk.address + first * INT8.itemsize
            bring_bytes(self._resources, self._crossings, source, blocks.view(np.uint8)).wait()
            return floats_of(blocks, begin - first * BLOCK, end - first * BLOCK)
        values = np.empty(end - begin, chunk.dtype)
        source = chunk.address + begin * chunk.dtype.itemsize
        bring_values(self._resources, self._crossings, source, chunk.dtype, values).wait()
        return floats_of(values, 0, end - begin)

    def _fetched(self, slot: str, start: int, size: int) -> HostArray:
        values = np.empty(size, np.float32)
        self.read(slot, start, values).wait()
        return values
