"""All slots of a session lie in one allocation, each aligned, and none in another."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stepwire_server.engines.cuda.device import ALIGNMENT, CudaDevice, round_up
from stepwire_server.engines.cuda.state_arrays import CudaBlockSlot, CudaFlatSlot, Slab
from stepwire_server.engines.int8_moments import BLOCK, block_count, zero_code
from stepwire_server.engines.protocol import PARAM
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
    return [slot.values] if isinstance(slot, CudaFlatSlot) else [slot.codes, slot.absmax, slot.values]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 256, 257])
@pytest.mark.parametrize("precision", FLAT)
def test_a_flat_slot_takes_its_elements_rounded_up(fake, precision, size) -> None:
    itemsize, dtype, name = FLAT[precision]
    slab = Slab({PARAM: precision}, size, ())
    assert slab.nbytes == round_up(itemsize * size)
    _, slots = place(CudaDevice(fake(), 0), slab)
    slot = slots[PARAM]
    assert (slot.dtype.name, slot.values.dtype, slot.values.size) == (name, dtype, size)


@pytest.mark.parametrize(
    ("size", "kept", "parts"),
    [
        (0, [], (0, 0, 0)),
        (1, [], (256, 256, 0)),
        (1, [(0, 1)], (256, 256, 256)),
        (256, [(3, 67)], (256, 256, 256)),
        (257, [(0, 64), (100, 101)], (512, 256, 512)),
        (64 * 256, [], (64 * 256, 256, 0)),
        (64 * 256 + 1, [(0, 256)], (64 * 256 + 256, 512, 1024)),
    ],
)
def test_an_8_bit_slot_takes_codes_maxima_and_what_is_kept_each_rounded_up(fake, size, kept, parts) -> None:
    slab = Slab({"exp_avg": Precision.INT8}, size, kept)
    assert slab.nbytes == sum(parts)
    _, slots = place(CudaDevice(fake(), 0), slab)
    slot = slots["exp_avg"]
    count = sum(end - start for start, end in kept)
    assert [array.size for array in arrays_of(slot)] == [size, block_count(size), count]
    assert [array.dtype for array in arrays_of(slot)] == [np.uint8, np.float32, np.float32]
    assert (slot.kept.count, slot.kept.ranges, slot.signed) == (count, tuple(kept), True)


@pytest.mark.parametrize("size", [0, 1, 257, 1000])
@pytest.mark.parametrize("kept", [(), ((0, 1),)], ids=["nothing kept", "one kept"])
def test_slots_lie_inside_aligned_and_apart(fake, size, kept) -> None:
    precisions = {
        PARAM: Precision.FLOAT32,
        "exp_avg": Precision.INT8,
        "max_exp_avg_sq": Precision.BFLOAT16,
        "exp_avg_sq": Precision.INT8,
    }
    slab = Slab(precisions, size, kept if size else ())
    memory, slots = place(CudaDevice(fake(), 0), slab)
    assert list(slots) == list(precisions)
    assert [type(slot) for slot in slots.values()] == [CudaFlatSlot, CudaBlockSlot] * 2
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
    _, slots = place(device, Slab({PARAM: Precision.FLOAT32, name: Precision.INT8}, 600, [(0, 100)]))
    slot = slots[name]
    assert slot.signed is signed and slot.sign == ("signed" if signed else "unsigned")
    assert set(read(device, slot.codes).tolist()) == {zero_code(signed)}
    for array in (slot.absmax, slot.values, slots[PARAM].values):
        assert not read(device, array).any()


def test_ranges_are_what_kernels_take(fake) -> None:
    device = CudaDevice(fake(), 0)
    memory, slots = place(device, Slab({PARAM: Precision.BFLOAT16, "exp_avg": Precision.INT8}, 1000, [(300, 512)]))
    flat, block = slots[PARAM], slots["exp_avg"]
    (values,) = flat.range(7, 20)
    assert (values.data.ptr - memory.data.ptr, values.size) == (14, 20)
    for start, size, blocks in [(0, 1000, 4), (0, 1, 1), (256, 257, 2), (768, 232, 1), (512, 0, 0)]:
        codes, absmax = block.range(start, size)
        assert (codes.data.ptr - block.codes.data.ptr, codes.size) == (start, size)
        assert (absmax.data.ptr - block.absmax.data.ptr, absmax.size) == (start // BLOCK * 4, blocks)
    held = block.kept_range(310, 10)
    assert (held.data.ptr - block.values.data.ptr, held.size) == (40, 10)
    assert [block.kept_range(start, 1) for start in (0, 299, 512, 999)] == [None] * 4
