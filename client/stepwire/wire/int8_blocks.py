"""The 8-bit encoding of gradients: blocks of 256 elements, a float32 maximum and 256 codes each.

    absmax = max |x| over the block              code = x · 127 / absmax, rounded to nearest even, in [−127, 127]
    x ≈ code · (absmax / 127)

Decoding is two float32 operations, each rounded, so that every engine gets the same bits. The error is at most half a
code's width, absmax / 254. Roundings add 2⁻¹⁴ of that error, and subnormal numbers add 2⁻¹⁴³.

- A block of zeros has absmax 0 and codes 0.
- A block with NaN or Inf has its absmax, which is not finite, and codes 1. No decoded element is finite, so that a
  server can refuse the step. Codes 0 would make NaN of Inf.
- 127 · (absmax / 127) overflows for the largest float32 and for no other. The absmax of such a block is the second
  largest float32.

Blocks are those of the flat space. A chunk may end within a block. The sender fills the rest of that block with zeros,
which change no absmax, and the receiver ignores the rest. Signs are symmetric: a code of −128 is never sent, but
decodes like any other.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["BATCH", "BLOCK", "INT8", "decode_blocks", "decode_range", "encode_blocks"]

_Floats = npt.NDArray[np.float32]

BLOCK: Final = 256
"""The number of elements of a block."""

INT8: Final = np.dtype([("absmax", "<f4"), ("codes", "i1", (BLOCK,))])
"""One block, 260 bytes. `INT8` is the dtype of the encoding; `np.int8` is not a wire dtype."""

BATCH: Final = 64 * BLOCK
"""The number of elements encoded at a time, which stay in the second-level cache with their scratch memory."""

_MOST: Final = np.float32(127.0)
# From this value on, absmax / 127 is not subnormal and 127 / absmax does not overflow.
_LEAST_ABSMAX: Final = np.float32(2.0**-119)
_LARGEST: Final = np.finfo(np.float32).max
_LARGEST_SENT: Final = np.nextafter(_LARGEST, np.float32(0.0))


def encode_blocks(values: _Floats, out: npt.NDArray[Any]) -> None:
    """Encode elements into blocks.

    Args:
        values: the elements, `(n,) float32`.
        out: the blocks, `(ceil(n / 256),)` of `INT8`; the codes past the n-th become 0.
    """
    scratch = np.empty((min(BATCH, len(out) * BLOCK) // BLOCK, BLOCK), np.float32)
    with np.errstate(all="ignore"):
        for low in range(0, len(values), BATCH):
            rows = _rows(values[low : low + BATCH])
            _encode(rows, scratch[: len(rows)], out[low // BLOCK :][: len(rows)])


def decode_blocks(blocks: npt.NDArray[Any], count: int) -> _Floats:
    """Return the first `count` elements of blocks, `(count,) float32`."""
    return decode_range(blocks, 0, count)


def decode_range(blocks: npt.NDArray[Any], begin: int, end: int) -> _Floats:
    """Decode elements `[begin, end)` of blocks.

    Args:
        blocks: the blocks, `(n,)` of `INT8`, aligned or not.
        begin: the first element, counted from the first element of the first block.
        end: one past the last element.

    Returns:
        The elements, `(end − begin,) float32`.
    """
    first, last = begin // BLOCK, -(-end // BLOCK)
    values = np.empty((max(last - first, 0), BLOCK), np.float32)
    with np.errstate(all="ignore"):
        for low in range(0, len(values), BATCH // BLOCK):
            batch = blocks[first + low : min(first + low + BATCH // BLOCK, last)]
            scales = batch["absmax"] / _MOST
            np.multiply(batch["codes"], scales[:, None], out=values[low : low + len(batch)])
    return values.reshape(-1)[begin - first * BLOCK :][: end - begin]


def _encode(values: _Floats, scratch: _Floats, out: npt.NDArray[Any]) -> None:
    """Encode `(k, 256)` values; the scratch is of the same shape."""
    # Bit patterns without their sign have the order of magnitudes as integers, with NaN the largest. NumPy compares
    # integers faster.
    magnitudes = np.bitwise_and(values.view(np.uint32), np.uint32(0x7FFFFFFF), out=scratch.view(np.uint32))
    absmax: _Floats = np.max(magnitudes, axis=1).view(np.float32)
    usual = (absmax >= _LEAST_ABSMAX) & (absmax < _LARGEST)
    np.multiply(values, np.where(usual, _MOST / absmax, np.float32(0.0))[:, None], out=scratch)
    np.copyto(out["codes"], np.rint(scratch, out=scratch), casting="unsafe")
    out["absmax"] = absmax
    unusual = np.flatnonzero(~usual & (absmax != 0.0))
    if unusual.size:
        _encode_unusual(values[unusual], absmax[unusual], out, unusual)


def _encode_unusual(values: _Floats, absmax: _Floats, out: npt.NDArray[Any], rows: npt.NDArray[np.intp]) -> None:
    """Encode blocks with an absmax that is tiny, the largest float32, or not finite."""
    finite = np.isfinite(absmax)
    sent = np.where(finite, np.minimum(absmax, _LARGEST_SENT), absmax)
    scales = sent / _MOST
    codes = np.clip(np.rint(values / scales[:, None]), -_MOST, _MOST)
    codes[scales == 0.0] = 0.0
    codes[~finite] = 1.0
    out["codes"][rows] = codes
    out["absmax"][rows] = sent


def _rows(batch: _Floats) -> _Floats:
    """Shape elements into rows of one block; zeros fill the last row."""
    if len(batch) % BLOCK:
        batch = np.concatenate((batch, np.zeros(-len(batch) % BLOCK, np.float32)))
    return batch.reshape(-1, BLOCK)
