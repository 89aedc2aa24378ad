"""Chunks of flat arrays in wire dtypes: how they are held, viewed, converted and kept within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from stepwire.wire.int8_blocks import BLOCK, INT8, decode_range
from stepwire_server.engines.protocol import HostArray

__all__ = [
    "CONVERT_BLOCK",
    "STORED",
    "GradientChunk",
    "bits_of",
    "check_range",
    "convert",
    "count_of",
    "cut",
    "floats_of",
    "name_of",
]

# Wire dtypes as kernels see them. The keys are dtypes and not names, because NumPy needs 2 µs for a name.
STORED: dict[np.dtype[Any], Any] = {
    np.dtype(np.float32): np.dtype(np.float32),
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16),
    np.dtype(np.float16): np.dtype(np.uint16),
    INT8: np.dtype(np.uint8),
}

CONVERT_BLOCK = 16_384


class GradientChunk:
    """The `Gradient` of both engines.

    Attributes:
        dtype: the wire dtype.
        values: the elements in the form and the memory that kernels read: `(n,)`, or the received bytes of blocks.
        count: the number of elements.
    """

    __slots__ = ("count", "dtype", "values")

    def __init__(self, dtype: np.dtype[Any], values: Any, count: int) -> None:
        """Keep a chunk."""
        self.dtype = dtype
        self.values = values
        self.count = count

    def __len__(self) -> int:
        """Count the elements."""
        return self.count


def bits_of(array: HostArray) -> HostArray:
    """View an array of a wire dtype as kernels see it."""
    view: HostArray = array.view(STORED[array.dtype])
    return view


def name_of(dtype: np.dtype[Any]) -> str:
    """Return the name of a wire dtype in the names of kernels and codecs."""
    return "int8" if dtype == INT8 else dtype.name


def count_of(payload: HostArray, count: int | None) -> int:
    """Return the number of elements that a payload brings: all that it holds, or the count given.

    Raises:
        IndexError: the payload does not hold as many; requests are validated long before.
    """
    most = len(payload) * (BLOCK if payload.dtype == INT8 else 1)
    check_range("payload", 0, most if count is None else count, most)
    return most if count is None else count


def floats_of(payload: HostArray, begin: int, end: int) -> HostArray:
    """Decode elements `[begin, end)` of a payload of any wire dtype to float32; a payload of float32 is not copied."""
    if payload.dtype == INT8:
        return decode_range(payload, begin, end)
    return payload[begin:end].astype(np.float32, copy=False)


def convert(values: HostArray, out: HostArray) -> None:
    """Cast `values` into `out`, `(n,)` each, block by block: casts of bfloat16 hold the GIL for a block."""
    with np.errstate(all="ignore"):
        for low in range(0, len(out), CONVERT_BLOCK):
            out[low : low + CONVERT_BLOCK] = values[low : low + CONVERT_BLOCK]


def check_range(what: str, begin: int, end: int, size: int) -> None:
    """Keep compiled loops inside their arrays; requests are validated long before.

    Raises:
        IndexError: the range is not within `[0, size)`.
    """
    if not 0 <= begin <= end <= size:
        raise IndexError(f"elements [{begin}, {end}) of the {what} are outside its {size}")


def cut(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut `[0, size)` into ranges of at most `most` elements."""
    return ((low, min(low + most, size)) for low in range(0, size, most))
