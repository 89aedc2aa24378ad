"""The 8-bit code: its maps against their published values, its codes against a search, NumPy against Numba."""

from __future__ import annotations

import inspect
import types
from typing import Any

import numpy as np
import pytest

from stepwire_server.engines import int8_moments as dynamic_code
from stepwire_server.engines import scalar_codecs as numba_codecs
from stepwire_server.engines.int8_moments import (
    BLOCK,
    LEAST,
    SIGNED_MAP,
    UNSIGNED_MAP,
    block_count,
    decode_blocks,
    encode_blocks,
    encode_with,
)

pytestmark = pytest.mark.many

SIGNS = pytest.mark.parametrize("signed", [True, False])
INFINITE, NAN = 0x7F800000, 0x7FC00000
LARGEST = np.float32(3.4028235e38)
EXTREMES = np.array([2.0**-100, 2.0**-99, 1e-20, 1.0, 1e30, 2.0**126, 2.0**127, LARGEST], np.float32)
TINY = np.array([2.0**-149, 1e-45, 1e-40, 2.0**-126, 1e-30, 1e-10, 1e-8, 1.6e-7, 2.7e-7], np.float32)
"""Values nearest to 0 in both maps, beside a maximum of 1."""


def map_of(signed: bool) -> np.ndarray:
    return SIGNED_MAP if signed else UNSIGNED_MAP


def nearest(scaled: np.ndarray, signed: bool) -> np.ndarray:
    """Search in float64; of two equally near values take that nearer to zero, and zero without signs for zero alone."""
    values = map_of(signed).astype(np.float64)
    order = np.argsort(abs(values), kind="stable")
    distances = abs(scaled.astype(np.float64)[:, None] - values[order][None, :])
    if not signed:
        distances[scaled != 0.0, 0] = np.inf
    return order[np.argmin(distances, axis=1)].astype(np.uint8)


def middles(signed: bool) -> np.ndarray:
    """Return the float32 nearest to each middle between two values and its neighbours on both sides."""
    values = map_of(signed).astype(np.float64)
    centres = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    return np.concatenate([np.nextafter(centres, np.float32(-2)), centres, np.nextafter(centres, np.float32(2))])


def gauss(size: int, signed: bool, seed: int = 0) -> np.ndarray:
    """Return normal values times a factor that differs from element to element by many decades."""
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal(size) * np.exp(generator.uniform(-18, 2, size))).astype(np.float32)
    return values if signed else abs(values)


@SIGNS
def test_map(signed: bool) -> None:
    values = map_of(signed)
    assert values.dtype == np.float32 and values.shape == (256,)
    assert np.all(np.diff(values) > 0)
    assert 0.0 in values and values[-1] == 1.0
    assert not np.signbit(values[values == 0.0]).any()


def test_ends_of_the_maps() -> None:
    """As in bitsandbytes; the decimals are those that torch prints."""
    assert SIGNED_MAP[0] == np.float32(-0.99296874) and SIGNED_MAP[127] == 0.0 and SIGNED_MAP[254] == -SIGNED_MAP[0]
    assert SIGNED_MAP[128] == np.float32(5.5000004e-07)
    assert UNSIGNED_MAP[0] == 0.0 and UNSIGNED_MAP[1] == np.float32(3.2500003e-07)
    assert UNSIGNED_MAP[254] == np.float32(0.9964844)


@SIGNS
def test_map_is_the_published_formula(signed: bool) -> None:
    """Evaluate the formula exactly; bitsandbytes does so in float32, a few roundings away."""
    expected = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** (decade if signed else decade + 1)
        for j in range(count):
            value = 10.0 ** (decade - 6) * (0.1 + 0.9 * (j + 0.5) / count)
            expected += [value, -value] if signed else [value]
    np.testing.assert_allclose(map_of(signed), np.sort(expected), rtol=3 * 2.0**-24)


@SIGNS
def test_encode_finds_the_nearest(signed: bool) -> None:
    values = np.concatenate([map_of(signed), middles(signed), gauss(20_000, signed)])
    values = np.clip(values, -1.0 if signed else 0.0, 1.0)
    absmax = np.ones(block_count(len(values)), np.float32)
    np.testing.assert_array_equal(encode_with(values, absmax, signed), nearest(values, signed))


@SIGNS
def test_encode_blocks_is_the_largest_and_the_nearest(signed: bool) -> None:
    values = gauss(40 * BLOCK, signed)
    codes, absmax = encode_blocks(values, signed)
    np.testing.assert_array_equal(absmax, abs(values).reshape(-1, BLOCK).max(axis=1))
    scaled = values * np.repeat(np.float32(1) / absmax, BLOCK)
    np.testing.assert_array_equal(codes, nearest(scaled, signed))


def test_exact_tie_goes_towards_zero() -> None:
    """Between two float32 whose middle is a float32: powers of two apart."""
    for signed in (True, False):
        values = map_of(signed).astype(np.float64)
        exact = (values[1:] + values[:-1]) / 2
        ties = exact[exact == exact.astype(np.float32)].astype(np.float32)
        assert len(ties) > 10
        codes = encode_with(ties, np.ones(block_count(len(ties)), np.float32), signed)
        chosen = abs(map_of(signed)[codes])
        assert np.all((chosen < abs(ties)) | (codes == 1 - signed))


@pytest.mark.parametrize("largest", EXTREMES)
def test_a_second_moment_that_is_not_zero_never_gets_the_code_of_zero(largest: np.float32) -> None:
    """Whatever its product with 1 / absmax is: far below the smallest value of the map, or an underflow."""
    below = np.concatenate([TINY, TINY * min(largest, np.float32(1e30))])
    below = below[(below > 0) & (below < largest * UNSIGNED_MAP[1] / 2)]
    assert len(below) > 3
    values = np.concatenate([[largest], below, [0.0, -0.0]]).astype(np.float32)
    codes, absmax = encode_blocks(values, False)
    assert absmax.tolist() == [largest]
    assert codes.tolist() == [255, *[1] * len(below), 0, 0]
    decoded = decode_blocks(codes, absmax, False)
    assert ((decoded == 0.0) == (values == 0.0)).all()
    assert (decoded[decoded > 0.0] >= np.float32(2.0**-126)).all(), "none is subnormal"


@pytest.mark.parametrize("largest", EXTREMES)
def test_a_first_moment_far_below_the_smallest_value_is_zero(largest: np.float32) -> None:
    """The smallest value in its place would be any multiple of it, and so would an update."""
    below = np.concatenate([TINY, -TINY]) * min(largest, np.float32(1e30))
    codes, _ = encode_blocks(np.concatenate([[largest], below]).astype(np.float32), True)
    assert codes.tolist() == [255, *[127] * len(below)]


def test_the_smallest_second_moment_reaches_down_to_zero_and_up_to_its_middle() -> None:
    middle = np.float32((UNSIGNED_MAP[1].astype(np.float64) + UNSIGNED_MAP[2]) / 2)
    edges = [0.0, 2.0**-149, UNSIGNED_MAP[1] / 2, np.nextafter(middle, np.float32(0)), np.nextafter(middle, 1)]
    assert encode_with(np.float32(edges), np.ones(1, np.float32), False).tolist() == [0, 1, 1, 1, 2]


def test_rounding_bounds_the_quotient_of_moments() -> None:
    """Of any first moment and any second one, as large a factor as the module says; an even grid of patterns."""
    patterns = np.arange(0x00800000, 0x3F800001, 977, dtype=np.uint32)
    values = np.concatenate([patterns.view(np.float32), [np.float32(1.0)]])
    one = np.ones(block_count(len(values)), np.float32)
    first = decode_blocks(encode_with(values, one, True), one, True) / values
    second = values / decode_blocks(encode_with(values, one, False), one, False)
    assert first.max() == pytest.approx(2.0, rel=1e-3)
    assert np.sqrt(second.max()) == pytest.approx(1.368, rel=1e-3)


@SIGNS
def test_codes_survive_decoding(signed: bool) -> None:
    codes = np.arange(256, dtype=np.uint8)
    generator = np.random.default_rng(1)
    patterns = generator.integers(LEAST, INFINITE, 3_000, dtype=np.uint32)
    for absmax in np.concatenate([EXTREMES, patterns.view(np.float32)])[:, None]:
        np.testing.assert_array_equal(encode_with(decode_blocks(codes, absmax, signed), absmax, signed), codes)


@SIGNS
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 64 * 256 - 1, 64 * 256, 64 * 256 + 1, 40_000])
def test_short_last_blocks(signed: bool, size: int) -> None:
    values = gauss(size, signed)
    codes, absmax = encode_blocks(values, signed)
    assert len(codes) == size and len(absmax) == block_count(size) == -(-size // 256)
    decoded = decode_blocks(codes, absmax, signed)
    for low in range(0, size, BLOCK):
        part = slice(low, min(low + BLOCK, size))
        expected = encode_blocks(values[part].copy(), signed)
        np.testing.assert_array_equal(codes[part], expected[0])
        assert absmax[low // BLOCK] == expected[1][0] == abs(values[part]).max()
        np.testing.assert_array_equal(decoded[part], map_of(signed)[codes[part]] * expected[1][0])


@SIGNS
@pytest.mark.parametrize("value", [0.0, -0.0])
def test_blocks_of_zeros_are_zeros(signed: bool, value: float) -> None:
    codes, absmax = encode_blocks(np.full(300, value, np.float32), signed)
    assert absmax.view(np.uint32).tolist() == [0, 0]
    assert not decode_blocks(codes, absmax, signed).view(np.uint32).any()


@SIGNS
@pytest.mark.parametrize("largest", [2.0**-149, 1.1754942e-38, 2.0**-126, np.nextafter(np.float32(2.0**-100), 0)])
def test_a_block_of_tiny_values_has_the_least_absmax(signed: bool, largest: float) -> None:
    """No second moment becomes 0, and nothing is subnormal: the values are those of a larger block."""
    values = np.float32(largest) * np.linspace(1e-3, 1, 300, dtype=np.float32)
    values[7] = 0.0
    codes, absmax = encode_blocks(values, signed)
    assert absmax.view(np.uint32).tolist() == [LEAST, LEAST] and absmax[0] == np.float32(2.0**-100)
    np.testing.assert_array_equal(codes, nearest(values.astype(np.float64) * 2.0**100, signed))
    decoded = decode_blocks(codes, absmax, signed)
    assert signed or ((decoded == 0.0) == (values == 0.0)).all()
    assert (decoded[decoded > 0] > 2.0**-126).all()
    again = encode_blocks(decoded, signed, absmax)
    assert (again[0] == codes).all() and (again[1] == absmax).all()


@SIGNS
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_a_value_that_is_not_finite_makes_its_block_so(signed: bool, value: float) -> None:
    """Infinite without signs, since a second moment may overflow; NaN otherwise."""
    values = gauss(3 * BLOCK, signed)
    values[BLOCK + 7], values[BLOCK + 8] = value, 0.0
    codes, absmax = encode_blocks(values, signed)
    infinite = np.isinf(value) and not signed
    assert absmax.view(np.uint32)[1] == (INFINITE if infinite else NAN) and np.isfinite(absmax[[0, 2]]).all()
    assert set(codes[BLOCK : 2 * BLOCK].tolist()) == {0 if signed else 255}
    decoded = decode_blocks(codes, absmax, signed).reshape(3, BLOCK)
    assert np.isfinite(decoded[[0, 2]]).all()
    assert (decoded[1] == np.inf).all() if infinite else np.isnan(decoded[1]).all()
    again = encode_blocks(decoded.reshape(-1), signed, absmax)
    assert (again[0] == codes).all() and (again[1].view(np.uint32) == absmax.view(np.uint32)).all()


def test_nan_beside_an_infinity_is_nan() -> None:
    assert encode_blocks(np.float32([1.0, np.inf, np.nan]), False)[1].view(np.uint32).tolist() == [NAN]


@SIGNS
@pytest.mark.parametrize("given", [0.0, -0.0, 1e-45, 2.0**-101, -1.0, np.inf, -np.inf, np.nan, -np.nan])
def test_a_given_maximum_that_is_none_is_found(signed: bool, given: float) -> None:
    values = gauss(BLOCK + 9, signed)
    expected = encode_blocks(values, signed)
    codes, absmax = encode_blocks(values, signed, np.float32([given, given]))
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(absmax, expected[1])


@SIGNS
@pytest.mark.parametrize("given", [2.0**-100, 0.5, 3.0, LARGEST])
def test_a_given_maximum_is_used(signed: bool, given: float) -> None:
    values = gauss(BLOCK + 9, signed)
    codes, absmax = encode_blocks(values, signed, np.float32([given, given]))
    assert absmax.tolist() == [given, given]
    np.testing.assert_array_equal(codes, encode_with(values, absmax, signed))


def test_values_outside_the_map() -> None:
    one = np.ones(1, np.float32)
    assert encode_with(np.float32([-1, -5, 5, -np.inf, np.inf]), one, True).tolist() == [0, 0, 255, 0, 255]
    assert encode_with(np.float32([-1, -1e-9, 5, np.inf]), one, False).tolist() == [255, 1, 255, 255]


_LOOPS = """
@kernel
def encode(values, codes, absmax):
    for low in range(0, values.size, 256):
        high = min(low + 256, values.size)
        largest = uint32(0)
        for i in range(low, high):
            largest = max(largest, magnitude(values[i]))
        absmax[low // 256] = absmax_of(largest, uint32({most}))
        scale = scale_of(absmax[low // 256])
        fill = fill_of(largest)
        for i in range(low, high):
            codes[i] = encode_{variant}(values[i], scale, fill)


@kernel
def decode(codes, absmax, values):
    for i in range(codes.size):
        values[i] = decode_{variant}(codes[i], absmax[i // 256])
"""


def generated(signed: bool) -> Any:
    """Write a module as kernels are generated, from text alone, and compile it."""
    numba = pytest.importorskip("numba")
    scalar = [numba_codecs.as_bits, numba_codecs.as_float, dynamic_code.magnitude, dynamic_code.absmax_of]
    scalar += [dynamic_code.scale_of, dynamic_code.fill_of]
    scalar += [dynamic_code.encode_signed, dynamic_code.encode_unsigned]
    scalar += [dynamic_code.decode_signed, dynamic_code.decode_unsigned]
    text = "from __future__ import annotations\nfrom typing import Any\n"
    text += f"from numpy import {', '.join(dynamic_code.NUMPY_NAMES)}\n" + dynamic_code.tables_source()
    text += "".join(f"\n@helper\n{inspect.getsource(function)}" for function in scalar)
    text += _LOOPS.format(variant="signed" if signed else "unsigned", most=dynamic_code.most_of(signed))
    module = types.ModuleType("generated_dynamic_code")
    module.__dict__["helper"] = numba.njit(error_model="numpy")
    module.__dict__["kernel"] = numba.njit(error_model="numpy")
    exec(compile(text, "<generated>", "exec"), module.__dict__)
    return module


@SIGNS
def test_numba_agrees_bit_for_bit(signed: bool) -> None:
    module = generated(signed)
    generator = np.random.default_rng(2)
    anything = generator.integers(0, 2**32, 4_000, dtype=np.uint32).view(np.float32)
    anything = anything[np.isfinite(anything)]
    tiny = generator.integers(0, 0x01000000, 2_000, dtype=np.uint32).view(np.float32)
    special = gauss(2_000, signed)
    special[::300] = [np.nan, np.inf, -np.inf, -np.nan, 0.0, -0.0, 1e-45]
    near = np.concatenate([[np.float32(1.0)], middles(signed), EXTREMES, -EXTREMES, np.zeros(700, np.float32)])
    beside = np.concatenate([np.resize([largest, *TINY, *-TINY, 0.0, -0.0], BLOCK) for largest in EXTREMES])
    for values in (anything, tiny, special, near, beside.astype(np.float32), gauss(70_001, signed), np.float32([])):
        codes, absmax = encode_blocks(values, signed)
        other_codes, other_absmax = np.empty_like(codes), np.empty_like(absmax)
        module.encode(values, other_codes, other_absmax)
        np.testing.assert_array_equal(other_codes, codes)
        np.testing.assert_array_equal(other_absmax.view(np.uint32), absmax.view(np.uint32))
        decoded, other_decoded = decode_blocks(codes, absmax, signed), np.empty(len(codes), np.float32)
        module.decode(codes, absmax, other_decoded)
        number = ~np.isnan(decoded)
        np.testing.assert_array_equal(number, ~np.isnan(other_decoded))
        np.testing.assert_array_equal(other_decoded.view(np.uint32)[number], decoded.view(np.uint32)[number])


def test_generated_tables_are_these() -> None:
    module = generated(True)
    for name in ("SIGNED_MAP", "UNSIGNED_MAP", "SIGNED_STEPS", "UNSIGNED_STEPS"):
        np.testing.assert_array_equal(getattr(module, name), getattr(dynamic_code, name))
