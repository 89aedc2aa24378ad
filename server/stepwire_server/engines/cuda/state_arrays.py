"""How one state array lies in a session's slab of GPU memory. Unverified on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from stepwire_server.engines.cuda.device import CudaDevice, round_up
from stepwire_server.engines.int8_moments import BLOCK, block_count, zero_code
from stepwire_server.engines.regions import Holding, PackedRanges, Region, packed
from stepwire_server.rules import EIGHT_BIT_SLOTS, Precision

__all__ = ["CudaBlockSlot", "CudaFlatSlot", "CudaHeldRange", "CudaMixedSlot", "CudaSlot", "Slab"]

_FLAT: dict[Precision, np.dtype[Any]] = {
    Precision.FLOAT32: np.dtype(np.float32),
    Precision.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


_MAXIMUM_BYTES: Final = 4


class CudaHeldRange(NamedTuple):
    """A range of a slot as kernels take it.

    Attributes:
        precision: the precision of its elements.
        addresses: the addresses of the elements, as arguments of kernels; in 8 bits they begin a block.
    """

    precision: Precision
    addresses: tuple[int, ...]


class CudaFlatSlot(NamedTuple):
    """Elements of one dtype, one after another.

    Attributes:
        values: device memory `(n,)`, float32 or uint16.
        precision: that of the elements.
    """

    values: Any
    precision: Precision

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype: float32, or bfloat16 for uint16."""
        return _FLAT[self.precision]

    def held(self, start: int, size: int) -> CudaHeldRange:
        """Return elements `[start, start + size)`, which the slot has."""
        return CudaHeldRange(self.precision, (self.address_of(start),))

    def address_of(self, start: int) -> int:
        """Return the address of an element."""
        address: int = self.values.data.ptr + start * self.values.dtype.itemsize
        return address


class CudaBlockSlot(NamedTuple):
    """Elements in 8 bits; see `cpu.state_arrays.BlockSlot`.

    Attributes:
        codes: device memory `(n,) uint8`.
        absmax: device memory `(n / 256,) float32`, rounded up.
        signed: True where the code has signs.
    """

    codes: Any
    absmax: Any
    signed: bool

    @property
    def sign(self) -> str:
        """The sign in the names of kernels."""
        return "signed" if self.signed else "unsigned"

    def held(self, start: int, size: int) -> CudaHeldRange:
        """Return elements `[start, start + size)`, which begin a block."""
        assert start % BLOCK == 0
        maxima = self.absmax.data.ptr + start // BLOCK * _MAXIMUM_BYTES
        return CudaHeldRange(Precision.INT8, (self.codes.data.ptr + start, maxima))


class CudaMixedSlot(NamedTuple):
    """Elements in several precisions; see `cpu.state_arrays.MixedSlot`.

    Attributes:
        parts: the ranges of each precision, and the slot that holds them one after another.
    """

    parts: tuple[tuple[PackedRanges, CudaFlatSlot | CudaBlockSlot], ...]

    def held(self, start: int, size: int) -> CudaHeldRange:
        """Return elements `[start, start + size)`, which lie in one region."""
        for ranges, slot in self.parts:
            if (at := ranges.at(start, size)) is not None:
                return slot.held(at, size)
        raise IndexError(f"no region holds elements [{start}, {start + size})")

    def within(self, start: int, end: int) -> Iterator[tuple[int, int, CudaFlatSlot | CudaBlockSlot, int]]:
        """Yield the parts of `[start, end)` that one slot holds in a row: start, end, the slot, and where in it."""
        for ranges, slot in self.parts:
            for low, high, at in ranges.within(start, end):
                yield low, high, slot, at


CudaSlot = CudaFlatSlot | CudaBlockSlot | CudaMixedSlot


class _Part(NamedTuple):
    """Elements of a slot that are held alike: all, or those of some ranges."""

    slot: str
    precision: Precision
    ranges: PackedRanges


class Slab:
    """The layout of one allocation with all slots of a session."""

    def __init__(self, slots: Mapping[str, Holding], size: int) -> None:
        """Lay out slots of `size` elements; see `Engine.allocate`."""
        self._slots = dict(slots)
        self._parts: list[_Part] = []
        for name, held in slots.items():
            regions = [Region(0, size, held)] if isinstance(held, Precision) else held
            self._parts += [_Part(name, precision, ranges) for precision, ranges in packed(regions).items()]

    @property
    def nbytes(self) -> int:
        """The bytes of the allocation."""
        return sum(
            round_up(count * np.dtype(dtype).itemsize) for part in self._parts for dtype, count in _arrays_of(part)
        )

    def place(self, device: CudaDevice, memory: Any) -> dict[str, CudaSlot]:
        """View `(nbytes,) uint8` of zeroed memory as slots; 8-bit ones get the code of zero, in the kernels' order."""
        made: dict[str, list[tuple[PackedRanges, CudaFlatSlot | CudaBlockSlot]]] = {name: [] for name in self._slots}
        offset = 0
        for part in self._parts:
            views = []
            for dtype, count in _arrays_of(part):
                views.append(device.view(memory, offset, count, dtype))
                offset += round_up(count * np.dtype(dtype).itemsize)
            made[part.slot].append((part.ranges, _slot(device, part, views)))
        return {
            name: parts[0][1] if isinstance(self._slots[name], Precision) else CudaMixedSlot(tuple(parts))
            for name, parts in made.items()
        }


def _slot(device: CudaDevice, part: _Part, views: list[Any]) -> CudaFlatSlot | CudaBlockSlot:
    if part.precision is not Precision.INT8:
        return CudaFlatSlot(views[0], part.precision)
    signed = EIGHT_BIT_SLOTS[part.slot]
    with device.current():
        views[0].data.memset_async(zero_code(signed), views[0].nbytes, device.compute)
    return CudaBlockSlot(views[0], views[1], signed)


def _arrays_of(part: _Part) -> list[tuple[Any, int]]:
    """Return the dtypes and the sizes of a part's arrays."""
    count = part.ranges.count
    if part.precision is Precision.INT8:
        return [(np.uint8, count), (np.float32, block_count(count))]
    return [(np.uint16 if part.precision is Precision.BFLOAT16 else np.float32, count)]
