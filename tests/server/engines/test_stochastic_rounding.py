"""Stochastic rounding: unbiased, the same for a scalar and for arrays, and blind to positions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire_server.engines.stochastic_rounding import encode_bfloat16_stochastic, round_stochastically, seeds_for

SEEDS = st.integers(0, 2**32 - 1)
PATTERNS = st.integers(0, 2**32 - 1)
HARD = np.array(
    [0.0, -0.0, 1.0, -1.0, 1.00390625, 1e-45, -1e-45, 1.1754944e-38, 1e-40, 3.4028235e38, -3.4028235e38, 3.3895e38],
    np.float32,
)


def floats(patterns: np.ndarray) -> np.ndarray:
    """Return the float32 of bfloat16's patterns."""
    return patterns.view(ml_dtypes.bfloat16).astype(np.float32)


def neighbours(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two bfloat16 around each finite value, towards zero and away from it."""
    inner = values.view(np.uint32) & np.uint32(0xFFFF0000)
    outer = np.where(inner == values.view(np.uint32), inner, inner + np.uint32(0x10000))
    return inner.view(np.float32), outer.astype(np.uint32).view(np.float32)


@given(st.lists(PATTERNS, min_size=1, max_size=50), SEEDS)
def test_a_scalar_is_rounded_as_in_an_array(patterns: list[int], seed: int) -> None:
    values = np.array(patterns, np.uint32).view(np.float32)
    with np.errstate(over="ignore"):
        alone = [int(encode_bfloat16_stochastic(value, np.uint32(seed))) for value in values]
    assert round_stochastically(values, seed).tolist() == alone


@given(st.lists(PATTERNS, min_size=1, max_size=50), SEEDS, st.randoms(use_true_random=False))
def test_a_value_is_rounded_alike_wherever_it_lies(patterns: list[int], seed: int, random) -> None:
    values = np.array(patterns, np.uint32).view(np.float32)
    order = list(range(len(values)))
    random.shuffle(order)
    assert (round_stochastically(values[order], seed) == round_stochastically(values, seed)[order]).all()
    assert (round_stochastically(values[:1].copy(), seed) == round_stochastically(values, seed)[:1]).all()


@given(st.lists(PATTERNS, min_size=1, max_size=50), SEEDS)
def test_finite_values_become_one_of_their_neighbours(patterns: list[int], seed: int) -> None:
    values = np.concatenate([np.array(patterns, np.uint32).view(np.float32), HARD])
    values = values[np.isfinite(values)]
    rounded = floats(round_stochastically(values, seed))
    inner, outer = neighbours(values)
    assert ((rounded == inner) | (rounded == outer)).all()
    assert (np.signbit(rounded) == np.signbit(values)).all()


@given(SEEDS)
def test_what_bfloat16_holds_stays(seed: int) -> None:
    every = np.arange(65_536, dtype=np.uint32).astype(np.uint16)
    with np.errstate(invalid="ignore"):
        rounded = round_stochastically(floats(every), seed)
    quiet = np.where(np.isnan(floats(every)), every | np.uint16(0x40), every)
    assert (rounded == quiet).all()


@pytest.mark.parametrize("seed", [0, 1, 0xFFFF, 0xFFFFFFFF])
def test_inf_stays_and_nan_stays_a_nan(seed: int) -> None:
    patterns = np.array([0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    rounded = floats(round_stochastically(patterns.view(np.float32), seed))
    assert rounded[:2].tolist() == [np.inf, -np.inf]
    assert np.isnan(rounded[2:]).all()
    assert (np.signbit(rounded) == np.signbit(patterns.view(np.float32))).all()


@given(st.integers(0, 0x7F7FFFFF), SEEDS)
def test_the_noise_is_the_hash_that_is_written_down(pattern: int, seed: int) -> None:
    """In plain integers; a session that goes on elsewhere must round as it would have here."""
    x = pattern ^ seed
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    value = np.array([pattern], np.uint32).view(np.float32)
    assert round_stochastically(value, seed).tolist() == [(pattern + (x >> 16)) >> 16]


def test_rounding_is_unbiased_over_seeds() -> None:
    """The share of roundings up is the part cut off: each of many values within 5 standard deviations, all within 6."""
    random, count = np.random.default_rng(11), 4000
    values = (random.standard_normal(2000) * 10.0 ** random.uniform(-30, 30, 2000)).astype(np.float32)
    ups = np.zeros(len(values))
    for step in range(count):
        (seed,) = seeds_for(step, 1)
        patterns = round_stochastically(values, seed)
        ups += patterns != (values.view(np.uint32) >> np.uint32(16))
    share = (values.view(np.uint32) & np.uint32(0xFFFF)) / 65_536
    deviation = np.sqrt(np.maximum(share * (1 - share), 1e-4) * count)
    score = (ups - share * count) / deviation
    assert (abs(score) < 5).mean() > 0.999 and abs(score).max() < 6
    assert abs(score.mean()) < 5 / np.sqrt(len(values))


def test_rounding_is_unbiased_over_values() -> None:
    """Within one step too, where all share a seed; the upper bits are far from uniform here."""
    values = np.random.default_rng(12).uniform(1.0, 2.0, 200_000).astype(np.float32)
    for seed in seeds_for(1, 8):
        error = floats(round_stochastically(values, seed)).astype(np.float64) - values
        assert abs(error.mean()) < 5 * error.std() / np.sqrt(len(values))


def test_a_small_step_is_not_lost() -> None:
    """A mean that moves by a thousandth of its grain a step arrives where float32 arrives, give or take noise."""
    rng = np.random.default_rng(3)
    target = rng.uniform(0.5, 1.5, 3000).astype(np.float32)
    held = np.zeros(3000, np.uint16)
    nearest = np.zeros(3000, ml_dtypes.bfloat16)
    for step in range(4000):
        rate = np.float32(0.001)
        old = floats(held)
        held = round_stochastically(old + rate * (target - old), seeds_for(step, 2)[1])
        old = nearest.astype(np.float32)
        nearest = (old + rate * (target - old)).astype(ml_dtypes.bfloat16)
    exact = target * np.float32(1.0 - 0.999**4000)
    assert abs(np.mean(floats(held) / exact) - 1) < 2e-3
    assert np.mean(nearest.astype(np.float32) / exact) < 0.9, "what rounding to nearest makes of it"


def test_seeds_differ_between_steps_and_slots_and_fit_32_bits() -> None:
    seeds = [seed for step in range(2000) for seed in seeds_for(step, 3)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in (*seeds, *seeds_for(2**32 - 1, 3), *seeds_for(0, 3)))
    assert seeds_for(5, 0) == ()
    assert seeds_for(5, 3)[:2] == seeds_for(5, 2), "a slot's seed does not depend on how many there are"
