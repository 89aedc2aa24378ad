"""Fingerprints of arrays: two numbers of 64 bits that differ, almost surely, if the arrays differ in any bit.

Each fingerprint is a sum of words times random weights, modulo 2⁶⁴. A product keeps nothing of the upper bits of a word
but their lowest digits. So a second sum, with weights of its own, has the upper halves of the words. Two arrays that
were not made with knowledge of the weights have one fingerprint with a chance of at most 2⁻³². Weights are drawn once
for each process, so fingerprints are compared within one process alone.

The alternatives: a copy needs the memory of the array, a CRC-32 takes twice as long, and a cryptographic hash takes
longer than the wire.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Fingerprint", "fingerprint"]

_WORDS: Final = 1 << 16  # 512 KiB: a block and its upper halves stay in the processor's cache
_HALF: Final = np.uint64(32)
_MODULUS: Final = 1 << 64
_SEED: Final = int.from_bytes(os.urandom(16), "little")
"""Drawn at the import: threads whose first fingerprints come at once have the same weights."""


class Fingerprint(NamedTuple):
    """The fingerprint of one array.

    Attributes:
        nbytes: the bytes of the array.
        whole: the weighted sum of its words.
        upper: the weighted sum of their upper halves.
    """

    nbytes: int
    whole: int
    upper: int


def fingerprint(array: npt.NDArray[Any]) -> Fingerprint:
    """Return the fingerprint of an array's bytes, in one pass."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = len(raw) - len(raw) % 8
    words = raw[:whole].view(np.uint64)
    if whole < len(raw):
        tail = np.zeros(8, np.uint8)
        tail[: len(raw) - whole] = raw[whole:]
        return _summed(len(raw), [words, tail.view(np.uint64)])
    return _summed(len(raw), [words])


def _summed(nbytes: int, parts: list[npt.NDArray[np.uint64]]) -> Fingerprint:
    weights, others, factor = _weights()
    upper = np.empty(min(_WORDS, max(map(len, parts))), np.uint64)
    sums = [0, 0]
    for part in parts:
        for start in range(0, len(part), _WORDS):
            block = part[start : start + _WORDS]
            count = len(block)
            np.right_shift(block, _HALF, out=upper[:count])
            now = np.einsum("i,i->", block, weights[:count]), np.einsum("i,i->", upper[:count], others[:count])
            # A power of an odd factor for each block: blocks that change places change the sums.
            sums = [(before * factor + int(each)) % _MODULUS for before, each in zip(sums, now, strict=True)]
    return Fingerprint(nbytes, sums[0], sums[1])


@functools.cache
def _weights() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], int]:
    generator = np.random.default_rng(_SEED)
    weights, others = generator.integers(0, 1 << 64, (2, _WORDS), np.uint64)
    return weights, others, int(generator.integers(0, 1 << 63)) * 2 + 1
