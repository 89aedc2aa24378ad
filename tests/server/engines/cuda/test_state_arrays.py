"""All slots of a session lie in one allocation, each aligned, and none in another."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stepwire_server.engines.cuda.device import ALIGNMENT, CudaDevice, round_up
from stepwire_server.engines.cuda.state_arrays import CudaBlockSlot, CudaFlatSlot, CudaMixedSlot, Slab
from stepwire_server.engines.int8_moments import BLOCK, block_count, zero_code
from stepwire_server.engines.protocol import PARAM
from stepwire_server.engines.regions import Region
from stepwire_server.rules import Precision

ORDERS = ["eager", "lazy", "greedy", *(("random", seed) for seed in range(4))]
FLAT = {Precision.FLOAT32: (4, np.float32, "float32"), Precision.BFLOAT16: (2, np.uint16, "bfloat16")}


def place(device: CudaDevice, slab: Slab) -> tuple[Any, dict[str, Any]]:
    """Allocate a slab, as the engine does."""
    memory = device.allocate(slab.nbytes)
    device.zero(memory)
    slots = slab.place(device, memory)
    with device.current():
        device.compute.synchronize()
    return memory, slots


def arrays_of(slot: Any) -> list[Any]:
    if isinstance(slot, CudaMixedSlot):
        return [array for _, part in slot.parts for array in arrays_of(part)]
    return [slot.values] if isinstance(slot, CudaFlatSlot) else [slot.codes, slot.absmax]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 256, 257])
@pytest.mark.parametrize("precision", FLAT)
def test_a_flat_slot_takes_its_elements_rounded_up(fake, precision, size) -> None:
    itemsize, dtype, name = FLAT[precision]
    slab = Slab({PARAM: precision}, size)
    assert slab.nbytes == round_up(itemsize * size)
    _, slots = place(CudaDevice(fake(), 0), slab)
    slot = slots[PARAM]
    assert (slot.dtype.name, slot.values.dtype, slot.values.size) == (name, dtype, size)


@pytest.mark.parametrize(
    ("size", "parts"), [(0, (0, 0)), (1, (256, 256)), (256, (256, 256)), (64 * 256 + 1, (64 * 256 + 256, 512))]
)
def test_an_8_bit_slot_takes_codes_and_maxima_each_rounded_up(fake, size, parts) -> None:
    slab = Slab({"exp_avg": Precision.INT8}, size)
    assert slab.nbytes == sum(parts)
    _, slots = place(CudaDevice(fake(), 0), slab)
    slot = slots["exp_avg"]
    assert [array.size for array in arrays_of(slot)] == [size, block_count(size)]
    assert [array.dtype for array in arrays_of(slot)] == [np.uint8, np.float32]
    assert slot.signed is True


REGIONS = (
    Region(0, 300, Precision.INT8),
    Region(300, 400, Precision.FLOAT32),
    Region(400, 500, Precision.BFLOAT16),
    Region(512, 1000, Precision.INT8),
)


def test_a_slot_of_several_precisions_takes_what_each_takes(fake) -> None:
    slab = Slab({"exp_avg": REGIONS}, 1000)
    assert slab.nbytes == 1024 + 256 + 512 + 256
    _, slots = place(CudaDevice(fake(), 0), slab)
    slot = slots["exp_avg"]
    assert [type(part) for _, part in slot.parts] == [CudaBlockSlot, CudaFlatSlot, CudaFlatSlot]
    assert [array.size for array in arrays_of(slot)] == [1000, 4, 112, 100]
    assert [array.dtype for array in arrays_of(slot)] == [np.uint8, np.float32, np.float32, np.uint16]


@pytest.mark.parametrize("size", [0, 1, 257, 1000])
@pytest.mark.parametrize("held", [Precision.INT8, REGIONS], ids=["in 8 bits", "mixed"])
def test_slots_lie_inside_aligned_and_apart(fake, size, held) -> None:
    holdings = {
        PARAM: Precision.FLOAT32,
        "exp_avg": held,
        "max_exp_avg_sq": Precision.BFLOAT16,
        "exp_avg_sq": held,
    }
    slab = Slab(holdings, size)
    memory, slots = place(CudaDevice(fake(), 0), slab)
    assert list(slots) == list(holdings)
    kind = CudaMixedSlot if held is REGIONS else CudaBlockSlot
    assert [type(slot) for slot in slots.values()] == [CudaFlatSlot, kind] * 2
    arrays = [array for slot in slots.values() for array in arrays_of(slot)]
    end = memory.data.ptr + memory.nbytes
    spans = sorted((array.data.ptr, array.data.ptr + array.nbytes) for array in arrays if array.size)
    assert all(begin % ALIGNMENT == 0 for begin, _ in spans)
    assert all(memory.data.ptr <= begin and stop <= end for begin, stop in spans)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    assert slab.nbytes == sum(round_up(array.nbytes) for array in arrays)


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize(("name", "signed"), [("exp_avg", True), ("exp_avg_sq", False)])
def test_all_elements_begin_as_zeros(fake, read, order, name, signed) -> None:
    device = CudaDevice(fake(order), 0)
    _, slots = place(device, Slab({PARAM: Precision.FLOAT32, name: REGIONS}, 1000))
    (_, block), (_, single), (_, half) = slots[name].parts
    assert block.signed is signed and block.sign == ("signed" if signed else "unsigned")
    assert set(read(device, block.codes).tolist()) == {zero_code(signed)}
    for array in (block.absmax, single.values, half.values, slots[PARAM].values):
        assert not read(device, array).any()


def test_ranges_are_what_kernels_take(fake) -> None:
    device = CudaDevice(fake(), 0)
    memory, slots = place(device, Slab({PARAM: Precision.BFLOAT16, "exp_avg": Precision.INT8}, 1000))
    flat, block = slots[PARAM], slots["exp_avg"]
    precision, (values,) = flat.held(7, 20)
    assert (precision, values - memory.data.ptr) == (Precision.BFLOAT16, 14)
    for start, size in [(0, 1000), (0, 1), (256, 257), (768, 232), (512, 0)]:
        precision, (codes, absmax) = block.held(start, size)
        assert precision is Precision.INT8
        assert (codes - block.codes.data.ptr, absmax - block.absmax.data.ptr) == (start, start // BLOCK * 4)


def test_ranges_of_several_precisions_are_what_kernels_take(fake) -> None:
    """Each starts at an address that is aligned as its place in the flat space is."""
    device = CudaDevice(fake(), 0)
    _, slots = place(device, Slab({"exp_avg": REGIONS}, 1000))
    slot = slots["exp_avg"]
    (_, block), (_, single), (_, half) = slot.parts
    for start, size, expected, offset in [
        (0, 300, block.codes, 0),
        (512, 488, block.codes, 512),
        (300, 100, single.values, 12),
        (310, 10, single.values, 22),
        (400, 100, half.values, 0),
    ]:
        address = slot.held(start, size).addresses[0]
        assert address - expected.data.ptr == offset * expected.dtype.itemsize
    for start, size in [(500, 1), (511, 1), (1000, 1), (299, 2), (0, 512), (512, 489)]:
        with pytest.raises(IndexError):
            slot.held(start, size)
