"""Fingerprints: any change of bits or of places changes them, at every length and across blocks."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire.arrays.fingerprints import _WORDS, Fingerprint, _weights, fingerprint

BLOCK_ELEMENTS = 2 * _WORDS
"""float32 elements of a block."""


@pytest.mark.parametrize("count", [1, 2, 3, BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS + 5])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_one_changed_bit_is_seen_wherever_it_is(count: int, dtype: Any) -> None:
    array = np.random.default_rng(count).standard_normal(count).astype(dtype)
    own = fingerprint(array)
    assert fingerprint(array.copy()) == own
    raw = array.view(np.uint8)
    for place in {0, len(raw) // 2, len(raw) - 1}:
        for bit in range(8):
            raw[place] ^= 1 << bit
            assert fingerprint(array) != own, (place, bit)
            raw[place] ^= 1 << bit


@pytest.mark.parametrize("factor", [-1.0, 0.5, 2.0**-16], ids=str)
@pytest.mark.parametrize("phase", [0, 1])
def test_changes_of_upper_bits_alone_are_seen(factor: float, phase: int) -> None:
    """Signs and exponents of every second float are the upper bits of words: a sum of words would lose their sum."""
    array = np.ones(4096, np.float32)
    own = fingerprint(array)
    array[phase::2] *= factor
    assert fingerprint(array) != own


def test_blocks_that_change_places_are_seen() -> None:
    array = np.random.default_rng(0).standard_normal(3 * BLOCK_ELEMENTS).astype(np.float32)
    swapped = np.concatenate([array[BLOCK_ELEMENTS : 2 * BLOCK_ELEMENTS], array[:BLOCK_ELEMENTS]])
    assert fingerprint(swapped) != fingerprint(array[: 2 * BLOCK_ELEMENTS])


def test_zeros_of_different_lengths_differ() -> None:
    prints = {fingerprint(np.zeros(count, np.uint8)) for count in range(18)}
    assert len(prints) == 18


def test_an_array_with_gaps_has_the_fingerprint_of_its_copy() -> None:
    wide = np.arange(4096, dtype=np.float32).reshape(64, 64)
    assert fingerprint(wide[:, ::3]) == fingerprint(wide[:, ::3].copy())
    assert fingerprint(wide.T) == fingerprint(np.ascontiguousarray(wide.T))


def test_threads_that_are_the_first_of_their_process_agree() -> None:
    """A step in doubt is known again by its fingerprint, whichever thread computed another one at the same time."""
    array, together = np.arange(1000.0), threading.Barrier(8)
    _weights.cache_clear()

    def computed(_: int) -> Fingerprint:
        together.wait(120.0)
        return fingerprint(array)

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(computed, range(8)))
    assert found == {fingerprint(array)}
