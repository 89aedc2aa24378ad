"""The 8-bit encoding of gradients against its definition, evaluated in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.wire.int8_blocks import BATCH, BLOCK, INT8, decode_blocks, decode_range, encode_blocks

LARGEST = float(np.finfo(np.float32).max)
SPECIAL = [0.0, -0.0, 1e-45, -1e-44, 1e-41, 3e-39, 2.0**-126, 1e-37, 2.0**-119, 1.0, LARGEST, -LARGEST]


def encoded(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Encode into memory that was something else before, at an address that is a multiple of nothing."""
    out = np.full(-(-len(values) // BLOCK) * INT8.itemsize + 1, 0x5A, np.uint8)[1:].view(INT8)
    encode_blocks(values, out)
    return out


def check_errors(values: npt.NDArray[np.float32]) -> None:
    """Compare each element with its decoded value: half a code's width apart, but for roundings."""
    decoded = decode_blocks(encoded(values), len(values))
    assert np.isfinite(decoded).all()
    for low in range(0, len(values), BLOCK):
        exact = values[low : low + BLOCK].astype(np.float64)
        errors = np.abs(decoded[low : low + BLOCK].astype(np.float64) - exact)
        assert errors.max() <= np.abs(exact).max() / 254.0 * (1.0 + 2.0**-14) + 2.0**-143


def test_a_block_is_260_bytes_maximum_first() -> None:
    assert (INT8.itemsize, INT8.fields["absmax"][1], INT8.fields["codes"][1]) == (260, 0, 4)  # type: ignore[index]
    values = np.zeros(BLOCK, np.float32)
    values[:4] = [127.0, -127.0, 63.0, -1.0]
    (block,) = encoded(values)
    assert block.tobytes() == np.float32(127.0).tobytes() + bytes([127, 129, 63, 255]) + bytes(252)


def test_codes_and_elements_are_those_of_the_definition() -> None:
    random = np.random.default_rng(0)
    values = (random.standard_normal(40 * BLOCK) * np.exp(random.uniform(-40, 40, 40 * BLOCK))).astype(np.float32)
    blocks = encoded(values)
    rows = values.reshape(-1, BLOCK).astype(np.float64)
    absmax = np.abs(rows).max(axis=1)
    assert (blocks["absmax"] == absmax.astype(np.float32)).all()
    exact = rows * 127.0 / absmax[:, None]
    near = np.abs(np.abs(exact - np.trunc(exact)) - 0.5) < 1e-4  # a tie in float64 may not be one in float32
    assert (blocks["codes"] == np.rint(exact))[~near].all()
    assert (np.abs(blocks["codes"] - exact) <= 0.5001).all()
    scales = (blocks["absmax"] / np.float32(127.0))[:, None]
    expected = blocks["codes"].astype(np.float32) * scales
    assert decode_blocks(blocks, len(values)).tobytes() == expected.tobytes()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=600))
def test_the_error_is_at_most_half_a_code(numbers: list[float]) -> None:
    check_errors(np.array(numbers, np.float32))


@pytest.mark.parametrize("largest", SPECIAL)
def test_the_error_is_at_most_half_a_code_whatever_the_maximum(largest: float) -> None:
    spread = np.random.default_rng(1).uniform(-1.0, 1.0, 2 * BLOCK + 7)
    with np.errstate(under="ignore"):
        values = (spread * largest).astype(np.float32)
    values[[0, BLOCK + 3, 2 * BLOCK + 6]] = largest
    check_errors(values)


def test_zeros_have_no_maximum_and_no_codes() -> None:
    for zero in (0.0, -0.0):
        assert encoded(np.full(300, zero, np.float32)).tobytes() == bytes(2 * INT8.itemsize)


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
@given(place=st.integers(0, 2 * BLOCK + 9), others=st.sampled_from([0.0, 1e-40, 1.0, 3e38]))
def test_one_element_that_is_not_finite_makes_its_block_so_and_no_other(odd: float, place: int, others: float) -> None:
    values = np.full(2 * BLOCK + 10, others, np.float32)
    values[place] = odd
    blocks = encoded(values)
    decoded = decode_blocks(blocks, len(values))
    block = place // BLOCK
    broken = np.arange(len(values)) // BLOCK == block
    assert (np.isfinite(decoded) == ~broken).all()
    assert np.isfinite(blocks["absmax"]).tolist() == [index != block for index in range(3)]
    assert (blocks["codes"][block] == 1).all()


@pytest.mark.parametrize("size", [1, 255, 256, 257, BATCH, BATCH + 1, 3 * BATCH + 300])
def test_what_fills_up_the_last_block_changes_nothing_and_is_zero(size: int) -> None:
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    blocks = encoded(values)
    full = np.zeros(len(blocks) * BLOCK, np.float32)
    full[:size] = values
    assert blocks.tobytes() == encoded(full).tobytes()
    assert not decode_blocks(blocks, len(full))[size:].any()


@given(st.integers(0, 2 * BATCH), st.integers(0, 2 * BATCH))
def test_any_range_is_decoded_as_the_whole_is(one: int, other: int) -> None:
    begin, end = sorted((one, other))
    whole = decode_blocks(BLOCKS, 2 * BATCH)
    assert decode_range(BLOCKS, begin, end).tobytes() == whole[begin:end].tobytes()


def test_nothing_is_nothing() -> None:
    assert encoded(np.empty(0, np.float32)).size == 0
    assert decode_range(encoded(np.ones(5, np.float32)), 3, 3).tolist() == []


def test_encoding_neither_warns_nor_changes_its_input() -> None:
    values = np.array([np.nan, np.inf, 0.0, LARGEST, 1e-45], np.float32)
    before = values.tobytes()
    with np.errstate(all="raise"):
        decode_blocks(encoded(values), 5)
        decode_blocks(encoded(values[2:]), 3)
    assert values.tobytes() == before


BLOCKS = encoded(np.random.default_rng(7).standard_normal(2 * BATCH).astype(np.float32))
