"""How state arrays are held."""

from __future__ import annotations

import numpy as np
import pytest

from stepwire_server.engines.cpu.state_arrays import BlockSlot, FlatSlot, MixedSlot, Slot, make_slot, slot_bytes
from stepwire_server.engines.int8_moments import BLOCK, LEAST, block_count, zero_code
from stepwire_server.engines.regions import PackedRanges, Region, packed
from stepwire_server.rules import Precision

FLAT = [(Precision.FLOAT32, 4, np.float32), (Precision.BFLOAT16, 2, np.uint16)]


@pytest.mark.parametrize(("precision", "size", "dtype"), FLAT)
def test_a_slot_starts_as_zeros_and_is_counted(precision, size, dtype) -> None:
    slot = make_slot("exp_avg", precision, 1000)
    assert isinstance(slot, FlatSlot)
    assert slot.nbytes == slot_bytes(precision, 1000) == 1000 * size
    held = slot.held(7)
    assert (held.precision, held.at) == (precision, 7)
    (array,) = held.arrays
    assert array.dtype == dtype and array.shape == (1000,) and not array.any()
    assert slot_bytes(precision, 0) == make_slot("exp_avg", precision, 0).nbytes == 0


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
        slot = make_slot("exp_avg", precision, 40_010)
        slot.write(7, unaligned(values))
        whole = np.full(40_010, 9.0, np.float32)
        slot.read(0, whole)
        assert_same_bits(whole[7:-3], expected.astype(np.float32))
        assert not whole[:7].any() and not whole[-3:].any()
        out = np.empty(39_999 * wire[name].itemsize + 1, np.uint8)[1:].view(wire[name])
        slot.read(8, out)
        assert_same_bits(out.copy(), expected[1:].astype(wire[name]))


def test_bfloat16_slots_round_what_is_written_to_nearest_even() -> None:
    slot = make_slot("exp_avg", Precision.BFLOAT16, 4)
    slot.write(0, np.array([1.00390625, 1.01171875, 1.004, 3.4e38], np.float32))
    out = np.empty(4, np.float32)
    slot.read(0, out)
    assert out.tolist() == [1.0, 1.015625, 1.0078125, np.inf]


# --- blocks of 8 bits -----------------------------------------------------------------------------------------

SIZE = 256 * 5


def read(slot: Slot, start: int, count: int) -> np.ndarray:
    out = np.full(count, 9.0, np.float32)
    slot.read(start, out)
    return out


def scale_of(slot: Slot, start: int, count: int) -> np.ndarray:
    out = np.full(count, 9.0, np.float32)
    slot.read_scale(start, out)
    return out


def filled(values: np.ndarray, name: str = "exp_avg") -> BlockSlot:
    slot = make_slot(name, Precision.INT8, len(values))
    assert isinstance(slot, BlockSlot)
    slot.replace(0, values, None)
    return slot


def test_blocks_start_as_zeros_and_are_counted() -> None:
    for name in ("exp_avg", "exp_avg_sq"):
        slot = make_slot(name, Precision.INT8, SIZE)
        assert isinstance(slot, BlockSlot)
        assert slot.nbytes == slot_bytes(Precision.INT8, SIZE) == SIZE + 4 * 5
        assert not read(slot, 0, SIZE).any() and not scale_of(slot, 0, SIZE).any()


@pytest.mark.parametrize("signed", [False, True])
def test_the_code_of_zero_is_that_of_fresh_slots(signed) -> None:
    slot = BlockSlot(signed, 300)
    assert set(slot.codes.tolist()) == {zero_code(signed)}
    slot.replace(0, np.zeros(300, np.float32), None)
    assert set(slot.codes.tolist()) == {zero_code(signed)}
    assert not read(slot, 0, 300).any()


@pytest.mark.parametrize(
    ("start", "count"), [(0, 0), (0, 1), (255, 2), (250, 100), (299, 2), (511, 2), (700, 400), (1279, 1)]
)
def test_a_part_reads_as_the_whole_does(start, count) -> None:
    slot = filled(np.random.default_rng(1).standard_normal(SIZE).astype(np.float32))
    assert (read(slot, start, count) == read(slot, 0, SIZE)[start : start + count]).all()
    assert (scale_of(slot, start, count) == scale_of(slot, 0, SIZE)[start : start + count]).all()


def odd_blocks(name: str) -> np.ndarray:
    """Make blocks of common values, of zeros, of subnormals, of the largest numbers, and one that is not finite."""
    values = np.random.default_rng(2).standard_normal(SIZE).astype(np.float32) ** 2
    values[BLOCK : 2 * BLOCK] = 0.0
    values[2 * BLOCK : 3 * BLOCK] *= np.float32(1e-42)
    values[3 * BLOCK : 4 * BLOCK] = np.float32(3.4028235e38)
    values[3 * BLOCK] = 1e-45
    values[4 * BLOCK + 3] = np.inf
    return values if name == "exp_avg_sq" else -values


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_values_and_scales_read_come_back_bit_for_bit(name, assert_same_bits) -> None:
    slot = filled(odd_blocks(name), name)
    values, scale = read(slot, 0, SIZE), scale_of(slot, 0, SIZE)
    assert scale[2 * BLOCK].view(np.uint32) == LEAST and not np.isfinite(scale[4 * BLOCK])
    again = make_slot(name, Precision.INT8, SIZE)
    assert isinstance(again, BlockSlot)
    again.replace(0, values.copy(), scale)
    assert (again.codes == slot.codes).all()
    assert_same_bits(again.absmax, slot.absmax)
    assert_same_bits(read(again, 0, SIZE), values)


def test_single_elements_of_blocks_cannot_be_written() -> None:
    with pytest.raises(TypeError):
        make_slot("exp_avg", Precision.INT8, SIZE).write(0, np.ones(1, np.float32))


# --- several precisions ---------------------------------------------------------------------------------------

REGIONS = (
    Region(0, 300, Precision.INT8),
    Region(300, 400, Precision.FLOAT32),
    Region(400, 500, Precision.BFLOAT16),
    Region(512, 1100, Precision.INT8),
    Region(1101, 1200, Precision.FLOAT32),
)
UNHELD = [(500, 512), (1100, 1101), (1200, SIZE)]


def mixed(values: np.ndarray, scale: np.ndarray | None = None) -> MixedSlot:
    slot = make_slot("exp_avg", REGIONS, SIZE)
    assert isinstance(slot, MixedSlot)
    slot.replace(0, values, scale)
    return slot


def test_regions_start_as_zeros_and_take_no_memory_from_each_other() -> None:
    slot = make_slot("exp_avg", REGIONS, SIZE)
    codes, singles, halves = 512 + 588, 8 + 104 + 99, 100  # elements; each range starts as it does in the flat space
    expected = codes + 4 * block_count(codes) + 4 * (singles - 4) + 2 * halves
    assert slot.nbytes == slot_bytes(REGIONS, SIZE)
    assert abs(slot.nbytes - expected) < 200
    assert not read(slot, 0, SIZE).any() and not scale_of(slot, 0, SIZE).any()


def test_each_region_is_held_in_its_precision(assert_same_bits) -> None:
    values = np.random.default_rng(3).standard_normal(SIZE).astype(np.float32)
    slot = mixed(values)
    got, scale = read(slot, 0, SIZE), scale_of(slot, 0, SIZE)
    for start, end, precision in REGIONS:
        alone = make_slot("exp_avg", precision, end - start)
        alone.replace(0, values[start:end].copy(), None)
        assert_same_bits(got[start:end], read(alone, 0, end - start))
        assert_same_bits(scale[start:end], scale_of(alone, 0, end - start))
    for start, end in UNHELD:
        assert not got[start:end].any() and not scale[start:end].any()


@pytest.mark.parametrize("start", [0, 1, 256, 299, 300, 399, 400, 499, 512, 1099, 1101, 1199])
def test_a_range_is_given_to_kernels_as_it_is_held(start, assert_same_bits) -> None:
    values = np.random.default_rng(4).standard_normal(SIZE).astype(np.float32)
    slot = mixed(values)
    (region,) = (each for each in REGIONS if each.start <= start < each.end)
    held = slot.held(start)
    assert held.precision is region.precision
    if region.precision is Precision.FLOAT32:
        (array,) = held.cut(region.end - start)
        assert_same_bits(array, values[start : region.end])
        array[:] = 7.0
        assert set(read(slot, start, region.end - start).tolist()) == {7.0}
    if region.precision is Precision.INT8 and start % BLOCK == 0:
        codes, absmax = held.cut(region.end - start)
        assert (len(codes), len(absmax)) == (region.end - start, block_count(region.end - start))
        assert absmax[0] == scale_of(slot, start, 1)[0] == abs(values[start : min(start + BLOCK, region.end)]).max()


def test_an_element_of_no_region_is_held_nowhere() -> None:
    slot = make_slot("exp_avg", REGIONS, SIZE)
    for start, _ in UNHELD:
        with pytest.raises(IndexError):
            slot.held(start)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, SIZE), (299, 301), (350, 450), (511, 513), (1000, 1150)])
def test_a_part_of_regions_reads_as_the_whole_does(start, end, wire, assert_same_bits) -> None:
    slot = mixed(np.random.default_rng(5).standard_normal(SIZE).astype(np.float32))
    whole, scale = read(slot, 0, SIZE), scale_of(slot, 0, SIZE)
    assert_same_bits(read(slot, start, end - start), whole[start:end])
    assert_same_bits(scale_of(slot, start, end - start), scale[start:end])
    out = np.empty(end - start, wire["float16"])
    slot.read(start, out)
    assert_same_bits(out, whole[start:end].astype(wire["float16"]))


def test_values_and_scales_of_regions_come_back_bit_for_bit(assert_same_bits) -> None:
    slot = mixed(np.random.default_rng(6).standard_normal(SIZE).astype(np.float32))
    values, scale = read(slot, 0, SIZE), scale_of(slot, 0, SIZE)
    again = mixed(values.copy(), scale)
    assert_same_bits(read(again, 0, SIZE), values)
    assert_same_bits(scale_of(again, 0, SIZE), scale)
    for (_, one), (_, other) in zip(slot.parts, again.parts, strict=True):
        for array, same in zip(one.held(0).arrays, other.held(0).arrays, strict=True):
            assert_same_bits(array, same)


def test_regions_of_other_precisions_are_written(assert_same_bits) -> None:
    slot = make_slot("exp_avg", REGIONS, SIZE)
    slot.write(310, np.full(150, 1.00390625, np.float32))
    assert_same_bits(read(slot, 310, 150), np.repeat(np.float32([1.00390625, 1.0]), [90, 60]))
    with pytest.raises(TypeError):
        slot.write(290, np.ones(20, np.float32))


# --- ranges one after another ---------------------------------------------------------------------------------

RANGES = [(10, 20), (20, 25), (300, 301), (512, 1024)]


def test_elements_are_counted_and_found_one_after_another() -> None:
    ranges = PackedRanges(RANGES, 1)
    assert (ranges.ranges, ranges.count) == (tuple(RANGES), 10 + 5 + 1 + 512)
    places = [(element, ranges.at(element)) for element in range(1100)]
    found = [(element, at) for element, at in places if at is not None]
    assert [at for _, at in found] == list(range(ranges.count))
    assert [element for element, _ in found] == [element for low, high in RANGES for element in range(low, high)]


@pytest.mark.parametrize(
    ("start", "size", "at"),
    [(10, 10, 0), (19, 1, 9), (19, 2, None), (20, 5, 10), (9, 1, None), (300, 1, 15), (300, 2, None)],
)
def test_elements_are_found_where_all_of_them_lie_in_one_range(start, size, at) -> None:
    assert PackedRanges(RANGES, 1).at(start, size) == at


def test_there_may_be_no_ranges() -> None:
    ranges = PackedRanges((), 16)
    assert (ranges.ranges, ranges.count, ranges.at(0), list(ranges.within(0, 1000))) == ((), 0, None, [])


@pytest.mark.parametrize("alignment", [1, 4, 16, 256])
def test_ranges_keep_their_alignment(alignment) -> None:
    """So blocks of 8 bits are blocks, and vectors begin at the same elements as those of the parameters."""
    ranges, end = PackedRanges(RANGES, alignment), 0
    for low, high in RANGES:
        at = ranges.at(low)
        assert at is not None and at >= end and at % alignment == low % alignment
        end = at + high - low
    assert ranges.count == end


def test_ranges_are_packed_by_their_precision() -> None:
    found = packed(REGIONS)
    assert {precision: ranges.ranges for precision, ranges in found.items()} == {
        Precision.INT8: ((0, 300), (512, 1100)),
        Precision.FLOAT32: ((300, 400), (1101, 1200)),
        Precision.BFLOAT16: ((400, 500),),
    }
    assert found[Precision.INT8].at(512) == 512 and found[Precision.INT8].count == 1100


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
def test_the_packed_parts_of_a_range_are_found(start, end, parts) -> None:
    assert list(PackedRanges(RANGES, 1).within(start, end)) == parts
