"""The 8-bit code of moments: blocks of 256 elements, a float32 maximum each, and a code of 256 values.

    absmax = max |x| over the block              code = the value of the map nearest to x·(1/absmax)
    x ≈ map[code]·absmax

The map ("dynamic tree": decimal exponent, linear fraction) has in decade i = 0 … 6 the values

    10^(i−6) · (0.1 + 0.9·(j + ½)/n),   j = 0 … n−1,   n = 2ⁱ of each sign, or 2ⁱ⁺¹ without signs

besides 0 and 1, sorted. Sources: Dettmers, Lewis, Shleifer & Zettlemoyer 2022, "8-bit Optimizers via Block-wise
Quantization"; `create_dynamic_map` of bitsandbytes. The last bits of a map there depend on the processor (up to 2 ulp),
as `torch.linspace` does. These are the bits of torch 2.13 on x86 with AVX2 or AVX-512, whose product and sum round
once.

**A second moment that is not zero never gets the code of zero.** bitsandbytes gives that code to all below half the
smallest value of the map. A second moment of zero beside a first moment that kept a code makes the update m / eps,
thousands of learning rates. So 32 bits are advised there for embeddings. In the exact formula m / √v is bounded,
because v is zero only where all gradients were. The code keeps that property: one rounding enlarges |m| at most by a
factor of 2, and lessens √v at most by one of 1.4.

The code with signs rounds to zero like any other value. m = 0 moves nothing, whereas the smallest value in place of an
m far below is any multiple of m. Divided by a v whose g² underflowed in float32, or by none, that would diverge.

The code departs from that of bitsandbytes in these points:

- Without signs, an x whose nearest value is 0 has the code of the smallest other value, 3.25e-7, unless x is 0.
- absmax is at least 2⁻¹⁰⁰, unless it is 0. So the values of every block decode to 0 or to normal numbers. Subnormal
  ones might round to 0, and processors are slow on them. Blocks that small are of gradients below 1e-15.
- A block without signs that holds an Inf, but no NaN, has absmax Inf and decodes to Inf throughout. A second moment
  overflows to Inf by a gradient of 6e20. With float32 moments its element never moves again, since m / Inf is 0; here
  its block does not. A block with a NaN, or with signs and an Inf, has absmax NaN (0x7FC00000) and decodes to NaN
  throughout.

Everything is defined on bits, so NumPy, Numba and CUDA agree on all of them:

- x·(1/absmax) is two float32 operations, each rounded; the nearest value to that product is exact. A product halfway
  between two values has the code of the one nearer to zero. Without signs, where the product underflows to 0, x
  itself, then below 2⁻²², stands in for it. −0 encodes as 0. The signed map has no −1, for which −0.993 stands in. The
  code without signs drops a sign.
- The codes of a block that decodes to Inf or NaN are all that of the largest magnitude: 255, or 0 with signs.
- Encoding what was decoded, with the same absmax, returns the same codes.

A code is found without a search. The pattern of a float32, read as an integer, is in order of its value. A cell is all
patterns with the same upper 15 or 16 bits. The map is so coarse that a cell holds at most one boundary between codes.
`steps[cell] + pattern` carries into the code's bits exactly from that boundary on: one look-up, one addition, one
shift. Without signs, the boundary of zero is the pattern 1: that costs nothing. Arithmetic per decade needs more
instructions than a look-up, so that even decoding was slower, and cannot meet boundaries exactly. Tables have an entry
for every cell there is, so no value, NaN included, can look outside them.

The functions from `decode_signed` on are scalar, for generated Numba kernels, as in `scalar_codecs`, whose `as_bits`
and `as_float` they call. The four tables have to be globals there, because Numba freezes globals into constants. LLVM
knows only of a constant that the stores of a loop leave it alone, without which the loop does not vectorise. With
tables as arguments a fused Adam kernel took much longer.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from numpy import arange, array, concatenate, float32, float64, int32, int64, searchsorted, sort, uint8, uint32, where

from stepwire_server.engines.protocol import HostArray
from stepwire_server.engines.scalar_codecs import as_bits, as_float

__all__ = [
    "BLOCK",
    "INFINITE",
    "LEAST",
    "NOT_A_NUMBER",
    "NUMPY_NAMES",
    "SIGNED_MAP",
    "SIGNED_STEPS",
    "UNSIGNED_MAP",
    "UNSIGNED_STEPS",
    "absmax_of",
    "block_count",
    "decode_blocks",
    "decode_signed",
    "decode_unsigned",
    "dynamic_map",
    "encode_blocks",
    "encode_signed",
    "encode_unsigned",
    "encode_with",
    "fill_of",
    "magnitude",
    "most_of",
    "scale_of",
    "signed_steps",
    "tables_source",
    "unsigned_steps",
    "zero_code",
]

BLOCK = 256
"""Elements that share one absmax."""

LEAST = 0x0D800000
"""The pattern of 2⁻¹⁰⁰, the least absmax of a block that is not all zeros."""

INFINITE = 0x7F800000
NOT_A_NUMBER = 0x7FC00000

# Elements that NumPy works on at a time: they and their intermediates stay in the second-level cache.
_ELEMENTS = 64 * BLOCK


def dynamic_map(signed: bool) -> Any:
    """Return the `(256,) float32` values of the code in ascending order; see the module."""
    parts: list[Any] = [array([0.0, 1.0], float32)]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        index = arange(count + 1)
        step = float64((float32(1.0) - float32(0.1)) / float32(count))
        rising = float64(float32(0.1)) + step * index  # exact in float64, so the cast below is the only rounding
        falling = 1.0 - step * (count - index)
        edges = where(index < (count + 1) // 2, rising, falling).astype(float32)
        values = float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / float32(2.0))
        parts += [values, -values] if signed else [values]
    return sort(concatenate(parts))


def unsigned_steps(values: Any) -> Any:
    """Return the `(32768,) uint32` table for which `(steps[b >> 16] + b) >> 17` is the code of the pattern b.

    `values` are ascending from 0, up to 256 of them; a pattern past the last one has the last one's code. The pattern 0
    alone has the code of 0.
    """
    middles = (values[1:].astype(float64) + values[:-1].astype(float64)) / 2.0
    middles[0] = 0.0
    rounded = middles.astype(float32)
    # The first pattern above each middle.
    bounds = rounded.view(uint32).astype(int64) + where(rounded.astype(float64) > middles, 0, 1)
    starts = arange(32768) << 16
    codes = searchsorted(bounds, starts, side="right")
    following = concatenate((bounds, [1 << 40]))[codes]
    crossed = following < starts + (1 << 16)
    steps = where(crossed, ((codes + 1) << 17) - following, (codes << 17) - starts)
    return (steps & 0xFFFFFFFF).astype(uint32)


def signed_steps(values: Any) -> Any:
    """Return the `(32768,) uint32` table for which `(steps[k >> 17] + k) >> 18` is the code of the key k.

    The key of a pattern is the pattern itself; where its sign is set, all other bits are flipped. So keys of negative
    values ascend too, above those of positive ones. `values` are those of the signed map.
    """
    middles = (values[1:].astype(float64) + values[:-1].astype(float64)) / 2.0
    rounded = abs(middles).astype(float32)
    bounds = rounded.view(uint32).astype(int64) + where(rounded.astype(float64) > abs(middles), 0, 1)
    # Of a negative middle the last key below it, plus one: a tie belongs to the code nearer to zero on both sides.
    bounds = where(middles < 0.0, (1 << 32) - bounds, bounds)
    positive = bounds[middles > 0.0]
    negative = bounds[middles < 0.0]
    starts = arange(32768) << 17
    below = searchsorted(negative, starts, side="right")
    above = searchsorted(positive, starts, side="right") + len(negative)
    codes = where(starts < 1 << 31, above, below)
    following = where(
        starts < 1 << 31,
        concatenate((bounds, [1 << 40]))[above],
        concatenate((negative, [1 << 40]))[below],
    )
    crossed = following < starts + (1 << 17)
    steps = where(crossed, ((codes + 1) << 18) - following, (codes << 18) - starts)
    return (steps & 0xFFFFFFFF).astype(uint32)


SIGNED_MAP = dynamic_map(True)
UNSIGNED_MAP = dynamic_map(False)
SIGNED_STEPS = signed_steps(SIGNED_MAP)
UNSIGNED_STEPS = unsigned_steps(UNSIGNED_MAP)

NUMPY_NAMES = (
    "arange",
    "array",
    "concatenate",
    "float32",
    "float64",
    "int32",
    "int64",
    "searchsorted",
    "sort",
    "uint32",
    "uint8",
    "where",
)
"""The names that a generated module imports from NumPy for `tables_source` and the scalar functions."""


def tables_source() -> str:
    """Write the statements that define the four tables in a generated module, without importing this one.

    So a change of the code changes the text, which is all that Numba's cache depends on.
    """
    functions = [inspect.getsource(function) for function in (dynamic_map, unsigned_steps, signed_steps)]
    return "\n\n".join(
        [
            *functions,
            "SIGNED_MAP = dynamic_map(True)\n"
            "UNSIGNED_MAP = dynamic_map(False)\n"
            "SIGNED_STEPS = signed_steps(SIGNED_MAP)\n"
            "UNSIGNED_STEPS = unsigned_steps(UNSIGNED_MAP)\n",
        ]
    )


def most_of(signed: bool) -> int:
    """Return the largest pattern that an absmax may have besides NaN: of infinity, or with signs the one below."""
    return INFINITE - signed


def block_count(size: int) -> int:
    """Count the blocks of `size` elements, a shorter last one included."""
    return -(-size // BLOCK)


def encode_blocks(values: HostArray, signed: bool, given: HostArray | None = None) -> tuple[HostArray, HostArray]:
    """Encode `(n,) float32` into `(n,) uint8` codes and `(block_count(n),) float32` absmax.

    Args:
        values: the values.
        signed: the code with signs.
        given: the absmax of each block; of effect where it is a number that an absmax can be, other than 0. So what was
            decoded is encoded as it was, and a maximum that belongs to no values makes no zeros of them.
    """
    absmax = np.empty(block_count(len(values)), np.float32)
    for low in range(0, len(values), _ELEMENTS):
        rows = _rows(values[low : low + _ELEMENTS])
        blocks = slice(low // BLOCK, low // BLOCK + len(rows))
        largest = (rows.view(np.uint32) & np.uint32(0x7FFFFFFF)).max(axis=1)
        if given is not None:
            patterns = given[blocks].view(np.uint32)
            largest = np.where((patterns >= LEAST) & (patterns < INFINITE), patterns, largest)
        largest[(largest > 0) & (largest < LEAST)] = LEAST
        largest[largest > most_of(signed)] = NOT_A_NUMBER
        absmax[blocks] = largest.view(np.float32)
    return encode_with(values, absmax, signed), absmax


def encode_with(values: HostArray, absmax: HostArray, signed: bool) -> HostArray:
    """Encode `(n,) float32` into codes, given the absmax of each block; what exceeds it gets the last code."""
    codes = np.empty(len(values), np.uint8)
    fills = np.where(np.isfinite(absmax), np.uint32(0), np.uint32(0xFFFFFFFF))[:, None]
    with np.errstate(all="ignore"):
        scales = (np.float32(1.0) / np.where(absmax == 0.0, np.float32(1.0), absmax))[:, None]
        for low in range(0, len(values), _ELEMENTS):
            rows = _rows(values[low : low + _ELEMENTS])
            blocks = slice(low // BLOCK, low // BLOCK + len(rows))
            scaled = rows * scales[blocks]
            if signed:
                bits = scaled.view(np.uint32) | fills[blocks]
                bits ^= (bits.view(np.int32) >> 31).view(np.uint32) & np.uint32(0x7FFFFFFF)
                found = (SIGNED_STEPS[bits >> 17] + bits) >> 18
            else:
                bits = np.where(scaled != 0.0, scaled, rows).view(np.uint32) | fills[blocks]
                bits &= np.uint32(0x7FFFFFFF)
                found = (UNSIGNED_STEPS[bits >> 16] + bits) >> 17
            part = codes[low : low + _ELEMENTS]
            part[:] = found.reshape(-1)[: len(part)]
    return codes


def decode_blocks(codes: HostArray, absmax: HostArray, signed: bool) -> HostArray:
    """Decode `(n,) uint8` codes and `(block_count(n),) float32` absmax into `(n,) float32`."""
    values = np.empty(len(codes), np.float32)
    table = SIGNED_MAP if signed else UNSIGNED_MAP
    with np.errstate(all="ignore"):
        for low in range(0, len(codes), _ELEMENTS):
            rows = _rows(codes[low : low + _ELEMENTS])
            factors = absmax[low // BLOCK :][: len(rows), None]
            part = values[low : low + _ELEMENTS]
            part[:] = (table[rows] * factors).reshape(-1)[: len(part)]
    return values


def _rows(values: HostArray) -> HostArray:
    """Shape contiguous values into rows of one block; zeros, which change no absmax, fill the last one up."""
    if len(values) % BLOCK:
        values = np.concatenate((values, np.zeros(-len(values) % BLOCK, values.dtype)))
    return values.reshape(-1, BLOCK)


def zero_code(signed: bool) -> int:
    """Return the code of zero."""
    return int(encode_blocks(np.zeros(1, np.float32), signed)[0][0])


def decode_signed(code: Any, absmax: Any) -> Any:
    """Return the value of a uint8 code with signs."""
    return SIGNED_MAP[code] * absmax


def decode_unsigned(code: Any, absmax: Any) -> Any:
    """Return the value of a uint8 code without signs."""
    return UNSIGNED_MAP[code] * absmax


def magnitude(value: Any) -> Any:
    """Return the pattern of |value|; the largest of a block is its absmax, in whatever order they are compared."""
    return uint32(as_bits(value) & 0x7FFFFFFF)


def absmax_of(largest: Any, most: Any) -> Any:
    """Return the absmax of a block whose largest magnitude has this pattern; most = `most_of(…)`."""
    raised = uint32(0x0D800000 if 0 < largest < 0x0D800000 else largest)
    return as_float(uint32(0x7FC00000 if raised > most else raised))


def scale_of(absmax: Any) -> Any:
    """Return the factor of a block's values; that of zeros leaves them zeros."""
    return float32(1.0) / (float32(1.0) if absmax == 0.0 else absmax)


def fill_of(largest: Any) -> Any:
    """Return the bits to set in all that is encoded: none, or all where a block is not finite."""
    return uint32(0xFFFFFFFF) if largest >= 0x7F800000 else uint32(0)


def encode_signed(value: Any, scale: Any, fill: Any) -> Any:
    """Return the code with signs; scale = `scale_of(…)`, fill = `fill_of(…)`."""
    bits = uint32(as_bits(value * scale) | fill)
    key = uint32(bits ^ uint32(uint32(int32(bits) >> 31) & 0x7FFFFFFF))
    return uint8(uint32(SIGNED_STEPS[uint32(key >> 17)] + key) >> 18)


def encode_unsigned(value: Any, scale: Any, fill: Any) -> Any:
    """Return the code without signs, that of zero for zero alone; arguments as for `encode_signed`."""
    scaled = value * scale
    bits = uint32(uint32(as_bits(scaled if scaled != 0.0 else value) | fill) & 0x7FFFFFFF)
    return uint8(uint32(UNSIGNED_STEPS[uint32(bits >> 16)] + bits) >> 17)
