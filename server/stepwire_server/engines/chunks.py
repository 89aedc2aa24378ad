"""Chunks of flat arrays in wire dtypes: how they are held, viewed, converted and kept within bounds."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from stepwire_server.engines.protocol import HostArray

__all__ = ["CONVERT_BLOCK", "STORED", "StagedChunk", "bits_of", "check_range", "convert"]

# Wire dtypes as kernels see them. Keyed by dtype and not by name, which takes NumPy 2 µs to compute.
STORED: dict[np.dtype[Any], Any] = {
    np.dtype(np.float32): np.dtype(np.float32),
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16),
    np.dtype(np.float16): np.dtype(np.uint16),
}

CONVERT_BLOCK = 16_384


class StagedChunk:
    """The `Gradient` of both engines.

    Attributes:
        dtype: the wire dtype.
        values: `(n,)`, in the form and the memory that the engine's kernels read.
    """

    __slots__ = ("dtype", "values")

    def __init__(self, dtype: np.dtype[Any], values: Any) -> None:
        """Keep a chunk."""
        self.dtype = dtype
        self.values = values

    def __len__(self) -> int:
        """Count the elements."""
        return len(self.values)


def bits_of(array: HostArray) -> HostArray:
    """View an array of a wire dtype as kernels see it."""
    view: HostArray = array.view(STORED[array.dtype])
    return view


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
