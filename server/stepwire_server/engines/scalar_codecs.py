"""Scalar codecs of the generated Numba kernels. Numba compiles these functions; Python never runs them.

bfloat16 and float16 travel as their bit patterns in uint16, since Numba knows neither as an arithmetic type.
Encoding rounds to nearest even, overflows to infinity and keeps NaN a NaN; the tests pin every pattern to
`ml_dtypes` and NumPy.

Numba widens mixed integers to 64 bits, where vectors hold half as many. `uint32(…)` around the branches of a choice
keeps the choice in 32 bits: 49 ms instead of 59 ms for 32 M elements of float16. Each choice picks between values that
are computed anyway, so that the loop vectorises. No path multiplies subnormal floats, which costs x86 processors more
than a hundred cycles each.
"""

from __future__ import annotations

from typing import Any

from numpy import float32, int8, uint16, uint32

__all__ = [
    "as_bits",
    "as_float",
    "decode_bfloat16",
    "decode_float16",
    "decode_float32",
    "decode_int8",
    "encode_bfloat16",
    "encode_float16",
    "encode_float32",
    "sign",
]


def sign(value: Any) -> Any:
    """Return −1, 0 or 1, or NaN for NaN, as NumPy's function does; Numba's own keeps the sign of −0."""
    return value if value != value else float32(value > 0.0) - float32(value < 0.0)


def as_bits(value: Any) -> Any:
    """Return the pattern of a float32 as uint32."""
    return float32(value).view(uint32)


def as_float(bits: Any) -> Any:
    """Return the float32 with this uint32 pattern."""
    return uint32(bits).view(float32)


def decode_float32(value: Any) -> Any:
    """Return a float32 as it is."""
    return value


def encode_float32(value: Any) -> Any:
    """Return a float32 as it is."""
    return value


def decode_bfloat16(half: Any) -> Any:
    """Return the float32 whose upper half is the pattern."""
    return as_float(uint32(half) << 16)


def encode_bfloat16(value: Any) -> Any:
    """Round to the upper half of the pattern; the carry of the rounding reaches infinity by itself."""
    bits = as_bits(value)
    rounded = uint32(bits + 0x7FFF + ((bits >> 16) & 1))
    quiet = uint32(bits | 0x400000)
    return uint16((quiet if value != value else rounded) >> 16)


def decode_float16(half: Any) -> Any:
    """Rebias the exponent (by 112; by 224 for Inf and NaN); a subnormal is its integer mantissa · 2⁻²⁴."""
    magnitude = uint32(half & 0x7FFF)
    subnormal = as_bits(float32(magnitude) * float32(2.0**-24))
    normal = uint32((magnitude << 13) + 0x38000000)
    special = uint32((magnitude << 13) + 0x70000000)
    bits = subnormal if magnitude < 0x0400 else normal if magnitude < 0x7C00 else special
    return as_float(bits | uint32((half & 0x8000) << 16))


def encode_float16(value: Any) -> Any:
    """Rebias and round; adding ½ lets the adder round a subnormal; 2¹⁶ and more is infinity."""
    magnitude = uint32(as_bits(value) & 0x7FFFFFFF)
    subnormal = uint32(as_bits(as_float(magnitude) + float32(0.5)) - 0x3F000000)
    odd = uint32((magnitude >> 13) & 1)
    normal = uint32(uint32(magnitude - 0x37FFF001 + odd) >> 13)
    special = uint32(0x7E00) if magnitude > 0x7F800000 else uint32(0x7C00)
    half = subnormal if magnitude < 0x38800000 else normal if magnitude < 0x47800000 else special
    return uint16(half | uint32((as_bits(value) >> 16) & 0x8000))


def decode_int8(received: Any, begin: Any, end: Any, values: Any) -> None:
    """Decode elements `[begin, end)` of blocks into `values`; see `stepwire.wire.int8_blocks`.

    The received bytes, of any alignment, are put together to the maximum of each block; the loop over its codes
    vectorises.
    """
    at = begin
    while at < end:
        block = at // 256
        stop = min(end, 256 * block + 256)
        upper = (uint32(received[260 * block + 3]) << 24) | (uint32(received[260 * block + 2]) << 16)
        lower = (uint32(received[260 * block + 1]) << 8) | uint32(received[260 * block])
        scale = as_float(upper | lower) / float32(127.0)
        codes = received[at + 4 * block + 4 : stop + 4 * block + 4]
        decoded = values[at - begin : stop - begin]
        for i in range(stop - at):
            decoded[i] = float32(int8(codes[i])) * scale
        at = stop
