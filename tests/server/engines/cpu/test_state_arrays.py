"""How state arrays are held."""

from __future__ import annotations

import numpy as np
import pytest

from stepwire_server.engines.cpu.state_arrays import BlockSlot, FlatSlot, make_slot, slot_bytes
from stepwire_server.engines.int8_moments import Kept, zero_code
from stepwire_server.rules import Precision

FLAT = [(Precision.FLOAT32, 4, np.float32), (Precision.BFLOAT16, 2, np.uint16)]


@pytest.mark.parametrize(("precision", "size", "dtype"), FLAT)
def test_a_slot_starts_as_zeros_and_is_counted(precision, size, dtype) -> None:
    slot = make_slot("exp_avg", precision, 1000, ())
    assert isinstance(slot, FlatSlot)
    assert slot.nbytes == slot_bytes(precision, 1000, ()) == 1000 * size
    (array,) = slot.arrays()
    assert array.dtype == dtype and array.shape == (1000,) and not array.any()
    assert slot_bytes(precision, 0, ()) == make_slot("exp_avg", precision, 0, ()).nbytes == 0


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("precision", "size", "dtype"), FLAT)
def test_ranges_are_read_and_written_in_any_wire_dtype(
    precision, size, dtype, name, wire, unaligned, assert_same_bits
) -> None:
    held = wire["bfloat16"] if precision is Precision.BFLOAT16 else wire["float32"]
    with np.errstate(all="ignore"):
        values = (np.random.default_rng(0).standard_normal(40_000) * 1e5).astype(wire[name])
        values[:5] = [np.inf, -np.inf, np.nan, 0.0, -0.0]
        expected = values.astype(held)
        slot = make_slot("exp_avg", precision, 40_010, ())
        slot.write(7, unaligned(values))
        whole = np.full(40_010, 9.0, np.float32)
        slot.read(0, whole)
        assert_same_bits(whole[7:-3], expected.astype(np.float32))
        assert not whole[:7].any() and not whole[-3:].any()
        out = np.empty(39_999 * wire[name].itemsize + 1, np.uint8)[1:].view(wire[name])
        slot.read(8, out)
        assert_same_bits(out.copy(), expected[1:].astype(wire[name]))


def test_bfloat16_slots_round_what_is_written_to_nearest_even() -> None:
    slot = make_slot("exp_avg", Precision.BFLOAT16, 4, ())
    slot.write(0, np.array([1.00390625, 1.01171875, 1.004, 3.4e38], np.float32))
    out = np.empty(4, np.float32)
    slot.read(0, out)
    assert out.tolist() == [1.0, 1.015625, 1.0078125, np.inf]


# --- blocks of 8 bits -----------------------------------------------------------------------------------------

SIZE = 256 * 5
KEPT = [(300, 512), (768, 1024)]
"""As layouts place them: after a kept range, nothing is held in 8 bits before the next block."""


def read(slot: BlockSlot, start: int, count: int) -> np.ndarray:
    out = np.empty(count, np.float32)
    slot.read(start, out)
    return out


def filled(values: np.ndarray, kept: list[tuple[int, int]]) -> BlockSlot:
    slot = make_slot("exp_avg", Precision.INT8, len(values), kept)
    assert isinstance(slot, BlockSlot)
    slot.replace(values.copy(), None)
    return slot


def test_blocks_start_as_zeros_and_are_counted() -> None:
    for name in ("exp_avg", "exp_avg_sq"):
        slot = make_slot(name, Precision.INT8, SIZE, KEPT)
        assert isinstance(slot, BlockSlot)
        assert slot.nbytes == slot_bytes(Precision.INT8, SIZE, KEPT) == SIZE + 4 * 5 + 4 * (212 + 256)
        assert not read(slot, 0, SIZE).any()


def test_kept_ranges_are_exact_and_others_near() -> None:
    values = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32)
    slot = filled(values, KEPT)
    kept = np.zeros(SIZE, bool)
    for low, high in KEPT:
        kept[low:high] = True
    got = read(slot, 0, SIZE)
    assert (got[kept] == values[kept]).all()
    assert np.abs(got - values)[~kept].max() < 0.02 * np.abs(values).max()


@pytest.mark.parametrize(
    ("start", "count"), [(0, 0), (0, 1), (255, 2), (250, 100), (299, 2), (511, 2), (700, 400), (1279, 1)]
)
def test_a_part_reads_as_the_whole_does(start, count) -> None:
    slot = filled(np.random.default_rng(1).standard_normal(SIZE).astype(np.float32), KEPT)
    assert (read(slot, start, count) == read(slot, 0, SIZE)[start : start + count]).all()
    scale, part = np.empty(SIZE, np.float32), np.empty(count, np.float32)
    slot.read_scale(0, scale)
    slot.read_scale(start, part)
    assert (part == scale[start : start + count]).all()


def test_kept_ranges_are_found_by_their_start() -> None:
    slot = filled(np.arange(SIZE, dtype=np.float32), KEPT)
    for start in (0, 299, 512, 767, 1024, SIZE - 1):
        assert slot.kept_range(start, 1) is None
    assert slot.kept_range(300, 212).tolist() == list(range(300, 512))
    assert slot.kept_range(390, 5).tolist() == list(range(390, 395))
    assert slot.kept_range(1023, 1).tolist() == [1023.0]
    slot.kept_range(300, 44)[:] = 7.0
    assert read(slot, 300, 44).tolist() == [7.0] * 44


def test_values_and_scales_read_come_back_bit_for_bit() -> None:
    slot = filled(np.random.default_rng(2).standard_normal(SIZE).astype(np.float32), KEPT)
    values, scale = read(slot, 0, SIZE), np.empty(SIZE, np.float32)
    slot.read_scale(0, scale)
    again = make_slot("exp_avg", Precision.INT8, SIZE, KEPT)
    assert isinstance(again, BlockSlot)
    again.replace(values.copy(), scale)
    assert (again.codes == slot.codes).all() and (again.absmax == slot.absmax).all()
    assert (read(again, 0, SIZE) == values).all()


def test_single_elements_of_blocks_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        make_slot("exp_avg", Precision.INT8, SIZE, KEPT).write(0, np.ones(1, np.float32))


# --- what is kept as float32 ----------------------------------------------------------------------------------

RANGES = [(10, 20), (20, 25), (300, 301), (512, 1024)]


def test_kept_elements_are_counted_and_found_one_after_another() -> None:
    kept = Kept(RANGES)
    assert (kept.ranges, kept.count) == (tuple(RANGES), 10 + 5 + 1 + 512)
    places = [(element, kept.at(element)) for element in range(1100)]
    found = [(element, at) for element, at in places if at is not None]
    assert [at for _, at in found] == list(range(kept.count))
    assert [element for element, _ in found] == [element for low, high in RANGES for element in range(low, high)]


def test_nothing_may_be_kept() -> None:
    kept = Kept(())
    assert (kept.ranges, kept.count, kept.at(0), list(kept.within(0, 1000))) == ((), 0, None, [])


@pytest.mark.parametrize(
    ("start", "end", "parts"),
    [
        (0, 10, []),
        (0, 11, [(10, 11, 0)]),
        (12, 15, [(12, 15, 2)]),
        (19, 21, [(19, 20, 9), (20, 21, 10)]),
        (5, 5, []),
        (25, 300, []),
        (24, 301, [(24, 25, 14), (300, 301, 15)]),
        (301, 512, []),
        (399, 513, [(512, 513, 16)]),
        (1023, 2000, [(1023, 1024, 527)]),
        (1024, 2000, []),
        (0, 2000, [(10, 20, 0), (20, 25, 10), (300, 301, 15), (512, 1024, 16)]),
    ],
)
def test_the_kept_parts_of_a_range_are_found(start, end, parts) -> None:
    assert list(Kept(RANGES).within(start, end)) == parts


@pytest.mark.parametrize("signed", [False, True])
def test_the_code_of_zero_is_that_of_fresh_slots(signed) -> None:
    slot = BlockSlot(signed, 300, ())
    assert set(slot.codes.tolist()) == {zero_code(signed)}
    slot.replace(np.zeros(300, np.float32), None)
    assert set(slot.codes.tolist()) == {zero_code(signed)}
    assert not read(slot, 0, 300).any()
