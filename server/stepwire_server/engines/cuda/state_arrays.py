"""How one state array lies in a session's slab of GPU memory. Unverified on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from stepwire_server.engines.cuda.device import CudaDevice, round_up
from stepwire_server.engines.int8_moments import BLOCK, Kept, block_count, zero_code
from stepwire_server.engines.protocol import Range
from stepwire_server.rules import EIGHT_BIT_SLOTS, Precision

__all__ = ["CudaBlockSlot", "CudaFlatSlot", "CudaSlot", "Slab"]

_FLAT = {Precision.FLOAT32: np.dtype(np.float32), Precision.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}


class CudaFlatSlot(NamedTuple):
    """Elements of one dtype, one after another.

    Attributes:
        values: device memory `(n,)`, float32 or uint16.
        dtype: float32, or bfloat16 for uint16.
    """

    values: Any
    dtype: np.dtype[Any]

    def range(self, start: int, size: int) -> tuple[Any, ...]:
        """Return elements `[start, start + size)` as arguments of kernels."""
        return (self.values[start : start + size],)


class CudaBlockSlot(NamedTuple):
    """Elements in 8 bits, but for small tensors; see `cpu.state_arrays.BlockSlot`.

    Attributes:
        codes: device memory `(n,) uint8`.
        absmax: device memory `(n / 256,) float32`, rounded up.
        values: device memory `(kept.count,) float32`.
        kept: the ranges of those elements.
        signed: True where the code has signs.
    """

    codes: Any
    absmax: Any
    values: Any
    kept: Kept
    signed: bool

    @property
    def sign(self) -> str:
        """The sign in the names of kernels."""
        return "signed" if self.signed else "unsigned"

    def range(self, start: int, size: int) -> tuple[Any, ...]:
        """Return elements `[start, start + size)`, which begin a block, as arguments of kernels."""
        return self.codes[start : start + size], self.absmax[start // BLOCK : block_count(start + size)]

    def kept_range(self, start: int, size: int) -> Any | None:
        """Return the float32 elements of a range, or None where it is held in 8 bits."""
        at = self.kept.at(start)
        return None if at is None else self.values[at : at + size]


CudaSlot = CudaFlatSlot | CudaBlockSlot


class Slab:
    """The layout of one allocation with all slots of a session."""

    def __init__(self, slots: Mapping[str, Precision], size: int, kept: Sequence[Range]) -> None:
        """Lay out slots of `size` elements; see `Engine.allocate`."""
        self._slots = dict(slots)
        self._size = size
        self._kept = Kept(kept)

    @property
    def nbytes(self) -> int:
        """The bytes of the allocation."""
        return sum(round_up(count * np.dtype(dtype).itemsize) for _, dtype, count in self._parts())

    def place(self, device: CudaDevice, memory: Any) -> dict[str, CudaSlot]:
        """View `(nbytes,) uint8` of zeroed memory as slots; 8-bit ones get the code of zero, in the kernels' order."""
        parts: dict[str, list[Any]] = {name: [] for name in self._slots}
        offset = 0
        for name, dtype, count in self._parts():
            parts[name].append(device.view(memory, offset, count, dtype))
            offset += round_up(count * np.dtype(dtype).itemsize)
        return {name: self._slot(device, name, views) for name, views in parts.items()}

    def _slot(self, device: CudaDevice, name: str, views: list[Any]) -> CudaSlot:
        precision = self._slots[name]
        if precision is not Precision.INT8:
            return CudaFlatSlot(views[0], _FLAT[precision])
        signed = EIGHT_BIT_SLOTS[name]
        with device.current():
            views[0].data.memset_async(zero_code(signed), views[0].nbytes, device.compute)
        return CudaBlockSlot(views[0], views[1], views[2], self._kept, signed)

    def _parts(self) -> Iterator[tuple[str, Any, int]]:
        for name, precision in self._slots.items():
            if precision is Precision.INT8:
                yield name, np.uint8, self._size
                yield name, np.float32, block_count(self._size)
                yield name, np.float32, self._kept.count
            else:
                yield name, np.uint16 if precision is Precision.BFLOAT16 else np.float32, self._size
