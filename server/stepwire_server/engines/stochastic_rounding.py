"""Stochastic rounding of float32 to bfloat16, for moments whose steps are smaller than bfloat16's grain.

Rounding to nearest would lose every change of a moment below 1/256 of it, and with it most of a slow average. So the
lower 16 bits, as a fraction of the grain, are the probability of rounding up: add 16 random bits and cut.

The random bits are a hash of the value's own pattern and of a seed that changes with the update and the slot. So the
bits do not depend on the place of an element: no split of a tensor over chunks, groups or sessions changes one. Nor has
the state of a generator to be kept. The price is that equal values in one update round alike, and that the mean of
their moments errs as far as each of them. The place in the flat space would part them. But a shard does not know where
in the whole its ranges lie, and a session with other groups or tensors has other places: their bits would differ.

The hash is Wellons's "lowbias32" (hash prospector, 2018) without its last shift, which does not reach the upper bits.
Hashes of one multiplication were 7 % cheaper, but neighbouring patterns rounded together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32, uint16, uint32

from stepwire_server.engines.protocol import HostArray

__all__ = ["encode_bfloat16_stochastic", "round_stochastically", "seeds_for"]


def noise(bits: Any, seed: Any) -> Any:
    """Return a number in [0, 2¹⁶) from a pattern and a seed."""
    x = uint32(bits ^ seed)
    x = uint32(uint32(x ^ uint32(x >> uint32(16))) * uint32(0x7FEB352D))
    x = uint32(uint32(x ^ uint32(x >> uint32(15))) * uint32(0x846CA68B))
    return uint32(x >> uint32(16))


def encode_bfloat16_stochastic(value: Any, seed: Any) -> Any:
    """Round a float32 up or down to a bfloat16's pattern; Inf stays, and NaN stays a NaN."""
    bits = float32(value).view(uint32)
    rounded = uint32(bits + noise(bits, seed))
    special = uint32(bits & uint32(0x7FFFFFFF)) >= uint32(0x7F800000)
    kept = uint32(bits | uint32(0x400000)) if value != value else bits
    return uint16((kept if special else rounded) >> uint32(16))


def round_stochastically(values: HostArray, seed: int) -> HostArray:
    """Round float32 elements `(n,)` to bfloat16's patterns `(n,) uint16`, each as the scalar function does."""
    bits = values.view(uint32)
    with np.errstate(over="ignore"):
        rounded = bits + noise_of(bits, seed)
    kept = np.where(np.isnan(values), bits | uint32(0x400000), bits)
    return (np.where(np.isfinite(values), rounded, kept) >> uint32(16)).astype(uint16)


def noise_of(bits: HostArray, seed: int) -> HostArray:
    """Return `noise` of each pattern."""
    x: HostArray = bits ^ uint32(seed)
    x = (x ^ (x >> uint32(16))) * uint32(0x7FEB352D)
    x = (x ^ (x >> uint32(15))) * uint32(0x846CA68B)
    return x >> uint32(16)


def seeds_for(seed: int, count: int) -> tuple[int, ...]:
    """Return a seed in [0, 2³²) for each of some slots, from that of an update."""
    return tuple((seed * 0x9E3779B1 + slot * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF for slot in range(count))
