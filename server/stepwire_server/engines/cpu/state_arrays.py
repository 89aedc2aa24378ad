"""How one state array is held in host memory, and how it becomes float32 and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from stepwire_server.engines.int8_moments import BLOCK, block_count, decode_blocks, encode_blocks, zero_code
from stepwire_server.engines.payloads import convert
from stepwire_server.engines.protocol import HostArray
from stepwire_server.engines.regions import Holding, PackedRanges, Region, packed
from stepwire_server.rules import EIGHT_BIT_SLOTS, Precision

__all__ = ["BlockSlot", "FlatSlot", "HeldRange", "MixedSlot", "Slot", "make_slot", "slot_bytes"]


class HeldRange(NamedTuple):
    """A range of a slot as kernels take it.

    Attributes:
        precision: the precision of its elements.
        arrays: the arrays that hold them; two for 8 bits, codes and maxima.
        at: the index of the first element there.
    """

    precision: Precision
    arrays: tuple[HostArray, ...]
    at: int

    def cut(self, size: int) -> tuple[HostArray, ...]:
        """Return the arrays of `size` elements alone, which start a block in 8 bits."""
        values = self.arrays[0][self.at : self.at + size]
        return (values, *(array[self.at // BLOCK : block_count(self.at + size)] for array in self.arrays[1:]))


class Slot(Protocol):
    """One state array of a session."""

    @property
    def nbytes(self) -> int:
        """The bytes that the slot holds."""
        ...

    def held(self, start: int) -> HeldRange:
        """Return how the elements from `start` on are held, up to the end of their region."""
        ...

    def read(self, start: int, out: HostArray) -> None:
        """Encode elements `[start, start + len(out))` into a wire dtype."""
        ...

    def read_scale(self, start: int, out: HostArray) -> None:
        """Encode the maximum of each element's block; zero for elements in another precision than 8 bits."""
        ...

    def write(self, start: int, values: HostArray) -> None:
        """Decode values of a wire dtype into elements `[start, start + len(values))`.

        Raises:
            TypeError: elements are held in 8 bits, and blocks are replaced as a whole.
        """
        ...

    def replace(self, start: int, values: HostArray, scale: HostArray | None) -> None:
        """Encode elements `[start, start + len(values))` anew; in 8 bits they start a block, and end one or the slot.

        Args:
            start: the first element.
            values: `(n,) float32`.
            scale: the maximum of each element's block, as `read_scale` gives it; None to find it.
        """
        ...


class FlatSlot:
    """Elements of one dtype, one after another.

    Attributes:
        values: `(n,)` float32, or uint16 with the patterns of bfloat16.
        moved: the elements lie in memory of somebody else, and must stay there.
    """

    def __init__(self, precision: Precision, size: int) -> None:
        """Make `size` zeroed elements."""
        self.values: HostArray = np.empty(size, np.uint16 if precision is Precision.BFLOAT16 else np.float32)
        self.values.fill(0)
        self.moved = False
        self._precision = precision

    @property
    def nbytes(self) -> int:
        """See `Slot`."""
        return self.values.nbytes

    def held(self, start: int) -> HeldRange:
        """See `Slot`."""
        return HeldRange(self._precision, (self.values,), start)

    def read(self, start: int, out: HostArray) -> None:
        """See `Slot`."""
        convert(self._typed()[start : start + len(out)], out)

    def read_scale(self, start: int, out: HostArray) -> None:
        """See `Slot`."""
        out[...] = 0

    def write(self, start: int, values: HostArray) -> None:
        """See `Slot`; bfloat16 rounds to nearest even."""
        convert(values, self._typed()[start : start + len(values)])

    def replace(self, start: int, values: HostArray, scale: HostArray | None) -> None:
        """See `Slot`."""
        self.write(start, values)

    def move(self, memory: HostArray) -> None:
        """Hold the elements in `memory` from now on, `(n,)` of the dtype of `values`."""
        assert memory.dtype == self.values.dtype
        memory[:] = self.values
        self.values, self.moved = memory, True

    def _typed(self) -> HostArray:
        typed: HostArray = self.values.view(ml_dtypes.bfloat16) if self.values.dtype == np.uint16 else self.values
        return typed


class BlockSlot:
    """Elements in 8 bits, with a maximum for each block of 256.

    Attributes:
        codes: `(n,) uint8`.
        absmax: `(n / 256,) float32`, rounded up.
    """

    def __init__(self, signed: bool, size: int) -> None:
        """Make `size` zeroed elements."""
        self.codes: HostArray = np.full(size, zero_code(signed), np.uint8)
        self.absmax: HostArray = np.zeros(block_count(size), np.float32)
        self._signed = signed

    @property
    def nbytes(self) -> int:
        """See `Slot`."""
        return self.codes.nbytes + self.absmax.nbytes

    def held(self, start: int) -> HeldRange:
        """See `Slot`."""
        return HeldRange(Precision.INT8, (self.codes, self.absmax), start)

    def read(self, start: int, out: HostArray) -> None:
        """See `Slot`."""
        first = start // BLOCK
        last = block_count(start + len(out))
        values = decode_blocks(self.codes[first * BLOCK : last * BLOCK], self.absmax[first:last], self._signed)
        convert(values[start - first * BLOCK :][: len(out)], out)

    def read_scale(self, start: int, out: HostArray) -> None:
        """See `Slot`."""
        convert(self.absmax[np.arange(start, start + len(out)) // BLOCK], out)

    def write(self, start: int, values: HostArray) -> None:
        """See `Slot`."""
        raise TypeError("8-bit elements are replaced all at once")

    def replace(self, start: int, values: HostArray, scale: HostArray | None) -> None:
        """See `Slot`."""
        codes, absmax = self.held(start).cut(len(values))
        codes[...], absmax[...] = encode_blocks(values, self._signed, None if scale is None else scale[::BLOCK].copy())


class MixedSlot:
    """Elements in several precisions, each in an array of its own.

    Attributes:
        parts: the ranges of each precision, and the slot that holds them one after another.
    """

    def __init__(self, name: str, regions: tuple[Region, ...]) -> None:
        """Make the zeroed elements of these regions."""
        self.parts: tuple[tuple[PackedRanges, FlatSlot | BlockSlot], ...] = tuple(
            (ranges, _plain_slot(name, precision, ranges.count)) for precision, ranges in packed(regions).items()
        )

    @property
    def nbytes(self) -> int:
        """See `Slot`."""
        return sum(slot.nbytes for _, slot in self.parts)

    def held(self, start: int) -> HeldRange:
        """See `Slot`."""
        for ranges, slot in self.parts:
            if (at := ranges.at(start)) is not None:
                return slot.held(at)
        raise IndexError(f"no region holds element {start}")

    def read(self, start: int, out: HostArray) -> None:
        """See `Slot`."""
        out[...] = 0
        for part, slot, at in self._within(start, len(out)):
            slot.read(at, out[part])

    def read_scale(self, start: int, out: HostArray) -> None:
        """See `Slot`."""
        out[...] = 0
        for part, slot, at in self._within(start, len(out)):
            slot.read_scale(at, out[part])

    def write(self, start: int, values: HostArray) -> None:
        """See `Slot`."""
        for part, slot, at in self._within(start, len(values)):
            slot.write(at, values[part])

    def replace(self, start: int, values: HostArray, scale: HostArray | None) -> None:
        """See `Slot`."""
        for part, slot, at in self._within(start, len(values)):
            slot.replace(at, values[part], None if scale is None else scale[part])

    def _within(self, start: int, size: int) -> Iterator[tuple[slice, FlatSlot | BlockSlot, int]]:
        """Yield the parts of a range that one slot holds in a row: where in the range, the slot, and where in it."""
        for ranges, slot in self.parts:
            for low, high, at in ranges.within(start, start + size):
                yield slice(low - start, high - start), slot, at


def make_slot(name: str, held: Holding, size: int) -> Slot:
    """Make a zeroed slot; see `Engine.allocate`."""
    return _plain_slot(name, held, size) if isinstance(held, Precision) else MixedSlot(name, held)


def _plain_slot(name: str, precision: Precision, size: int) -> FlatSlot | BlockSlot:
    return BlockSlot(EIGHT_BIT_SLOTS[name], size) if precision is Precision.INT8 else FlatSlot(precision, size)


def slot_bytes(held: Holding, size: int) -> int:
    """Return the bytes that a slot holds."""
    if not isinstance(held, Precision):
        return sum(slot_bytes(precision, ranges.count) for precision, ranges in packed(held).items())
    if held is Precision.INT8:
        return size + 4 * block_count(size)
    return size * (2 if held is Precision.BFLOAT16 else 4)
