"""The code of `int8_moments` in CUDA C, and its tables as shared memory holds them.

The full tables would not fit there. But all magnitudes below the smallest boundary between codes have one code, and all
above the largest one the last code. So a magnitude is clamped to those ends, and the tables hold the cells in between
alone. The one code is that of zero with signs, and without signs that of the smallest value, beside a zero of its own.
So there a product that underflowed is clamped like any other that small. The table of the signed code has the cells of
positive keys and then, turned round, those of negative ones. With these tables each of the 2³² patterns had the code of
the full tables.

The sign is that of the value and not of its product with the scale: the product of a NaN keeps its sign on a processor
and not on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from stepwire_server.engines.int8_moments import (
    LEAST,
    SIGNED_MAP,
    SIGNED_STEPS,
    UNSIGNED_MAP,
    UNSIGNED_STEPS,
    zero_code,
)
from stepwire_server.engines.protocol import HostArray

__all__ = ["DYNAMIC_CODE", "eight_bit_tables", "shared_tables"]

_ONE = 0x3F800000


def _pattern_of(value: np.float32) -> int:
    return int(value.view(np.uint32))


_SIGNED_LEAST = _pattern_of(SIGNED_MAP[SIGNED_MAP > 0.0][0] / np.float32(2.0))
_UNSIGNED_LEAST = _pattern_of(UNSIGNED_MAP[1])
_SIGNED_CELLS = slice(_SIGNED_LEAST >> 17, (_ONE >> 17) + 1)
_PARTS: Final[dict[str, HostArray]] = {
    "signed_map": SIGNED_MAP.view(np.uint32),
    "unsigned_map": UNSIGNED_MAP.view(np.uint32),
    "signed_steps": np.concatenate((SIGNED_STEPS[_SIGNED_CELLS], SIGNED_STEPS[::-1][_SIGNED_CELLS])),
    "unsigned_steps": UNSIGNED_STEPS[_UNSIGNED_LEAST >> 16 : (_ONE >> 16) + 1],
}


def eight_bit_tables() -> HostArray:
    """Return the argument `tables` of kernels, `(n,) uint32`: both maps as patterns, and the steps between the ends."""
    return np.concatenate(list(_PARTS.values()))


def shared_tables(names: Iterable[str]) -> list[str]:
    """Write the statements that copy some of the tables into shared memory; all threads of a block run them."""
    lines, wanted = [], set(names)
    start = 0
    for name, part in _PARTS.items():
        if name in wanted:
            lines.append(f"__shared__ unsigned int {name}[{len(part)}];")
            lines.append(f"copy_words({name}, tables + {start}, {len(part)});")
        start += len(part)
    return [*lines, "__syncthreads();"]


# All functions but `largest_given` are those of `int8_moments`. `largest_given` chooses between the largest magnitude
# of a block and a given maximum, as `encode_blocks` does.
DYNAMIC_CODE: Final = (
    f"""\
enum : unsigned int {{
    SIGNED_LEAST = {_SIGNED_LEAST}u,
    SIGNED_WIDTH = {len(_PARTS["signed_steps"]) // 2}u,
    UNSIGNED_LEAST = {_UNSIGNED_LEAST}u,
    UNSIGNED_ZERO = {zero_code(False)}u,
    ONE = {_ONE}u,
    LEAST_ABSMAX = {LEAST}u
}};
"""
    """
__device__ __forceinline__ void copy_words(unsigned int *to, const unsigned int *from, int size) {
    for (int i = (int)threadIdx.x; i < size; i += (int)blockDim.x) to[i] = from[i];
}

__device__ __forceinline__ unsigned int clamped(unsigned int pattern, unsigned int least, unsigned int most) {
    return pattern < least ? least : pattern > most ? most : pattern;
}

__device__ __forceinline__ float decode_code(unsigned char code, float absmax, const unsigned int *map) {
    return __uint_as_float(map[code]) * absmax;
}

__device__ __forceinline__ float absmax_of(unsigned int largest, unsigned int most) {
    const unsigned int raised = largest != 0u && largest < LEAST_ABSMAX ? LEAST_ABSMAX : largest;
    return __uint_as_float(raised > most ? 0x7FC00000u : raised);
}

__device__ __forceinline__ float scale_of(float absmax) { return 1.0f / (absmax == 0.0f ? 1.0f : absmax); }

__device__ __forceinline__ unsigned int fill_of(unsigned int largest) {
    return largest >= 0x7F800000u ? 0xFFFFFFFFu : 0u;
}

__device__ __forceinline__ unsigned char encode_signed(
    float value, float scale, unsigned int fill, const unsigned int *steps) {
    const unsigned int bits = (__float_as_uint(value * scale) | fill) & 0x7FFFFFFFu;
    const unsigned int magnitude = clamped(bits, SIGNED_LEAST, ONE);
    const bool negative = (__float_as_uint(value) | fill) >> 31 != 0u;
    const unsigned int cell = (magnitude >> 17) - (SIGNED_LEAST >> 17) + (negative ? SIGNED_WIDTH : 0u);
    return (unsigned char)((steps[cell] + (negative ? ~magnitude : magnitude)) >> 18);
}

__device__ __forceinline__ unsigned char encode_unsigned(
    float value, float scale, unsigned int fill, const unsigned int *steps) {
    const unsigned int bits = (__float_as_uint(value * scale) | fill) & 0x7FFFFFFFu;
    const unsigned int magnitude = clamped(bits, UNSIGNED_LEAST, ONE);
    const unsigned int code = (steps[(magnitude >> 16) - (UNSIGNED_LEAST >> 16)] + magnitude) >> 17;
    const unsigned int own = (__float_as_uint(value) | fill) & 0x7FFFFFFFu;
    return (unsigned char)(own == 0u ? UNSIGNED_ZERO : code);
}

__device__ __forceinline__ unsigned int largest_given(float given, unsigned int largest) {
    const unsigned int pattern = __float_as_uint(given);
    return LEAST_ABSMAX <= pattern && pattern < 0x7F800000u ? pattern : largest;
}
"""
)
