"""CUDA C that every generated module begins with: codecs, NumPy's choices, and the sum of a block of threads.

The tests pin each function to its Python twin: the codecs to `numba_codecs` and `rounding`, the choices to NumPy.
"""

from __future__ import annotations

from typing import Final

__all__ = ["PRELUDE", "SQUARES", "THREADS"]

THREADS: Final = 256
"""Threads of a block; a power of two."""

# NumPy's choices keep a NaN of either side. Of two zeros the first counts, as in Numba and in NumPy's scalar loops.
# NumPy's vector loops choose the second. sign(−0) is 0, as in NumPy. No state that steps have made depends on either.
_CODECS: Final = """\
__device__ __forceinline__ float maximum(float a, float b) { return a >= b || a != a ? a : b; }

__device__ __forceinline__ float minimum(float a, float b) { return a <= b || a != a ? a : b; }

__device__ __forceinline__ float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? 0.0f : x; }

__device__ __forceinline__ float decode_float32(float value) { return value; }

__device__ __forceinline__ float encode_float32(float value) { return value; }

__device__ __forceinline__ float decode_bfloat16(unsigned short half) {
    return __uint_as_float((unsigned int)half << 16);
}

__device__ __forceinline__ unsigned short encode_bfloat16(float value) {
    unsigned int bits = __float_as_uint(value);
    unsigned int rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    return (unsigned short)((value != value ? bits | 0x400000u : rounded) >> 16);
}

__device__ __forceinline__ unsigned short encode_bfloat16_stochastic(float value, unsigned int seed) {
    unsigned int bits = __float_as_uint(value);
    unsigned int noise = bits ^ seed;
    noise = (noise ^ (noise >> 16)) * 0x7FEB352Du;
    noise = (noise ^ (noise >> 15)) * 0x846CA68Bu;
    unsigned int rounded = bits + (noise >> 16);
    unsigned int kept = value != value ? bits | 0x400000u : bits;
    return (unsigned short)(((bits & 0x7FFFFFFFu) >= 0x7F800000u ? kept : rounded) >> 16);
}

__device__ __forceinline__ float decode_float16(unsigned short half) {
    unsigned int magnitude = half & 0x7FFFu;
    unsigned int subnormal = __float_as_uint((float)magnitude * (1.0f / 16777216.0f));
    unsigned int normal = (magnitude << 13) + (magnitude < 0x7C00u ? 0x38000000u : 0x70000000u);
    return __uint_as_float((magnitude < 0x0400u ? subnormal : normal) | (half & 0x8000u) << 16);
}

__device__ __forceinline__ unsigned short encode_float16(float value) {
    unsigned int bits = __float_as_uint(value);
    unsigned int magnitude = bits & 0x7FFFFFFFu;
    unsigned int subnormal = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u;
    unsigned int normal = (magnitude - 0x37FFF001u + ((magnitude >> 13) & 1u)) >> 13;
    unsigned int special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    unsigned int half = magnitude < 0x38800000u ? subnormal : magnitude < 0x47800000u ? normal : special;
    return (unsigned short)(half | (bits >> 16 & 0x8000u));
}
"""

# `Squares` are telemetry's, whose order of additions is free: see `measured_sums`. Each square has its place by its
# size, with the bounds 2⁻¹⁰⁰ and 2¹⁰⁰. Small and large numbers are multiplied by 2⁹⁰ and 2⁻⁸⁰ before they are squared,
# so no sum leaves float32; NaN and Inf are among the large. All threads of a block call `sum_block`, and the first of
# them puts the sums together, the only one to use double. Its first barrier keeps the calls of one kernel apart.
SQUARES: Final = """
struct Squares {
    float usual, small, large;
};

__device__ __forceinline__ void add_square(Squares &sum, float x) {
    const float square = x * x;
    if (square >= 7.88860905e-31f && square <= 1.26765060e+30f) {
        sum.usual += square;
    } else if (square < 1.0f) {
        const float scaled = x * 1.23794004e+27f;
        sum.small += scaled * scaled;
    } else {
        const float scaled = x * 8.27180613e-25f;
        sum.large += scaled * scaled;
    }
}

__device__ __forceinline__ void sum_block(Squares value, double *sum) {
    __shared__ float lanes[3 * THREADS];
    float *usual = lanes + threadIdx.x, *small = usual + THREADS, *large = small + THREADS;
    __syncthreads();
    *usual = value.usual;
    *small = value.small;
    *large = value.large;
    for (unsigned int width = THREADS / 2; width > 0; width /= 2) {
        __syncthreads();
        if (threadIdx.x >= width) continue;
        *usual += usual[width];
        *small += small[width];
        *large += large[width];
    }
    if (threadIdx.x == 0) *sum = *usual + *small * 6.525304467998525e-55 + *large * 1.461501637330903e+48;
}
""".replace("THREADS", str(THREADS))

PRELUDE: Final = _CODECS + SQUARES
