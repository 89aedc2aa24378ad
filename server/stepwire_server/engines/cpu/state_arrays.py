"""How one state array is held in host memory, and how it becomes float32 and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import ml_dtypes
import numpy as np

from stepwire_server.engines.int8_moments import (
    BLOCK,
    Kept,
    block_count,
    decode_blocks,
    encode_blocks,
    zero_code,
)
from stepwire_server.engines.payloads import convert
from stepwire_server.engines.protocol import HostArray, Range
from stepwire_server.rules import EIGHT_BIT_SLOTS, Precision

__all__ = ["BlockSlot", "FlatSlot", "Slot", "make_slot", "slot_bytes"]


class Slot(Protocol):
    """One state array of a session."""

    @property
    def nbytes(self) -> int:
        """The bytes that the slot holds."""
        ...

    def arrays(self) -> tuple[HostArray, ...]:
        """Return the arrays of this slot, as arguments of kernels."""
        ...

    def read(self, start: int, out: HostArray) -> None:
        """Encode elements `[start, start + len(out))` into a wire dtype."""
        ...

    def write(self, start: int, values: HostArray) -> None:
        """Decode values of a wire dtype into elements `[start, start + len(values))`."""
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

    @property
    def nbytes(self) -> int:
        """See `Slot`."""
        return self.values.nbytes

    def arrays(self) -> tuple[HostArray, ...]:
        """See `Slot`."""
        return (self.values,)

    def read(self, start: int, out: HostArray) -> None:
        """See `Slot`."""
        convert(self._typed()[start : start + len(out)], out)

    def write(self, start: int, values: HostArray) -> None:
        """See `Slot`; bfloat16 rounds to nearest even."""
        convert(values, self._typed()[start : start + len(values)])

    def move(self, memory: HostArray) -> None:
        """Hold the elements in `memory` from now on, `(n,)` of the dtype of `values`."""
        assert memory.dtype == self.values.dtype
        memory[:] = self.values
        self.values, self.moved = memory, True

    def _typed(self) -> HostArray:
        typed: HostArray = self.values.view(ml_dtypes.bfloat16) if self.values.dtype == np.uint16 else self.values
        return typed


class BlockSlot:
    """Elements in 8 bits, with a maximum for each block of 256, but for small tensors, whose elements are float32.

    Attributes:
        codes: `(n,) uint8`.
        absmax: `(n / 256,) float32`, rounded up.
    """

    def __init__(self, signed: bool, size: int, kept: Sequence[Range]) -> None:
        """Make `size` zeroed elements, those of `kept` as float32."""
        self.codes: HostArray = np.full(size, zero_code(signed), np.uint8)
        self.absmax: HostArray = np.zeros(block_count(size), np.float32)
        self._signed = signed
        self._kept = Kept(kept)
        self._kept_values: HostArray = np.zeros(self._kept.count, np.float32)

    @property
    def nbytes(self) -> int:
        """See `Slot`."""
        return self.codes.nbytes + self.absmax.nbytes + self._kept_values.nbytes

    def arrays(self) -> tuple[HostArray, ...]:
        """See `Slot`: codes and maxima."""
        return (self.codes, self.absmax)

    def kept_range(self, start: int, size: int) -> HostArray | None:
        """Return the float32 elements of a range, or None where it is held in 8 bits."""
        at = self._kept.at(start)
        return None if at is None else self._kept_values[at : at + size]

    def read(self, start: int, out: HostArray) -> None:
        """See `Slot`."""
        first = start // BLOCK
        last = block_count(start + len(out))
        values = decode_blocks(self.codes[first * BLOCK : last * BLOCK], self.absmax[first:last], self._signed)
        values = values[start - first * BLOCK :][: len(out)]
        for low, high, at in self._kept.within(start, start + len(out)):
            values[low - start : high - start] = self._kept_values[at : at + high - low]
        convert(values, out)

    def read_scale(self, start: int, out: HostArray) -> None:
        """Encode the maximum of each element's block; zero for elements that are float32."""
        blocks = np.arange(start, start + len(out)) // BLOCK
        values = self.absmax[blocks]
        for low, high, _ in self._kept.within(start, start + len(out)):
            values[low - start : high - start] = 0.0
        convert(values, out)

    def write(self, start: int, values: HostArray) -> None:
        """Refuse: blocks are replaced as a whole."""
        raise TypeError("8-bit elements are replaced all at once")

    def replace(self, values: HostArray, scale: HostArray | None) -> None:
        """Encode all elements anew.

        Args:
            values: `(n,) float32`; used up.
            scale: the maximum of each element's block, as `read_scale` gives it; None to find it.
        """
        for start, end, at in self._kept.within(0, len(values)):
            self._kept_values[at : at + end - start] = values[start:end]
            values[start:end] = 0.0
        given = None if scale is None else scale[::BLOCK].copy()
        self.codes, self.absmax = encode_blocks(values, self._signed, given)


def make_slot(name: str, precision: Precision, size: int, kept: Sequence[Range]) -> Slot:
    """Make a zeroed slot; see `Engine.allocate`."""
    if precision is Precision.INT8:
        return BlockSlot(EIGHT_BIT_SLOTS[name], size, kept)
    return FlatSlot(precision, size)


def slot_bytes(precision: Precision, size: int, kept: Sequence[Range]) -> int:
    """Return the bytes that a slot holds."""
    if precision is Precision.INT8:
        return size + 4 * block_count(size) + 4 * sum(end - start for start, end in kept)
    return size * (2 if precision is Precision.BFLOAT16 else 4)
