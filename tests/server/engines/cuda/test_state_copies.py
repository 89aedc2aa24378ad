"""State goes in and out of a GPU's memory with the bits that NumPy's casts, and the CPU's 8-bit slots, give it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire_server.engines import PARAM
from stepwire_server.engines.cpu.state_arrays import BlockSlot, MixedSlot, make_slot
from stepwire_server.engines.cuda import CudaEngine, CudaOptions
from stepwire_server.engines.cuda.source import block_kernels, gradient_kernels, module_source
from stepwire_server.engines.cuda.state_arrays import CudaBlockSlot, CudaMixedSlot
from stepwire_server.engines.int8_moments import BLOCK
from stepwire_server.engines.regions import Holding
from stepwire_server.rules import EIGHT_BIT_SLOTS, Precision
from tests.support.cuda_cases import regions_of

pytestmark = pytest.mark.many

ORDERS = ["eager", "lazy", "greedy", *(("random", seed) for seed in range(4))]
WIRE = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
HELD = {"float32": Precision.FLOAT32, "bfloat16": Precision.BFLOAT16}
BFLOAT16 = WIRE["bfloat16"]
SLOT = 1 << 12
OPTIONS = CudaOptions(buffers=3, buffer_bytes=SLOT, cells=32)
SIZE = 5 * SLOT // 4 + 77
# One element, all of one, borders of a slot of float32 and of one of 16 bits, each from one side and across.
RANGES = [(0, 0), (0, 1), (0, SIZE), (7, 7 + 1024), (1023, 1025), (1, 2049), (2047, 2050), (5, SIZE - 3), (SIZE, SIZE)]

every_order = pytest.mark.parametrize("order", ORDERS, ids=str)


@pytest.fixture(scope="module")
def library(shim, directory) -> Any:
    """The kernels that convert; without g++ there is nothing to test."""
    return shim.Library([module_source(gradient_kernels()), module_source(block_kernels())], directory)


@pytest.fixture
def engine(fake, library):
    """Start engines: `engine(order)`."""
    return lambda order: CudaEngine(cupy=fake(order, library=library), options=OPTIONS)


def drawn(size: int, seed: int = 0) -> np.ndarray:
    """Draw float32 of all magnitudes, the odd ones among them."""
    random = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        values = (random.standard_normal(size) * 10.0 ** random.uniform(-12, 12, size)).astype(np.float32)
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1e-40, 3.4e38, 65519.0, 65520.0, 6e-8, 1.00390625, 1.01171875]
    values[random.choice(size, size // 4, replace=False)] = random.choice(np.float32(odd), size // 4)
    return values


def cast(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    with np.errstate(all="ignore"):
        return values.astype(dtype)


def place(count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Make room that is aligned to nothing, and full of what must be overwritten."""
    return np.full(count * dtype.itemsize + 1, 0xEE, np.uint8)[1:].view(dtype)


# --- slots of one dtype -------------------------------------------------------------------------------------------


@every_order
@pytest.mark.parametrize("name", WIRE)
@pytest.mark.parametrize("held", HELD)
def test_ranges_are_written_and_read_as_numpy_casts(engine, assert_same_bits, unaligned, order, held, name) -> None:
    state = engine(order).allocate({PARAM: Precision.FLOAT32, "exp_avg": HELD[held]}, SIZE)
    expected = np.zeros(SIZE, WIRE[held])
    for turn, (low, high) in enumerate(RANGES):
        values = cast(drawn(SIZE, turn), WIRE[name])[low:high]
        source = unaligned(values)
        state.write("exp_avg", low, source)
        source.flags.writeable = True
        source.view(np.uint8)[:] = 0xEE
        expected[low:high] = cast(values, WIRE[held])
        outs = {wire: place(high - low, dtype) for wire, dtype in WIRE.items()}
        asked = [state.read("exp_avg", low, out) for out in outs.values()]
        state.write("exp_avg", low, np.zeros(high - low, np.float32))
        for pending in reversed(asked):
            pending.wait()
        state.write("exp_avg", low, cast(values, WIRE[name]))
        for wire, out in outs.items():
            assert_same_bits(out.copy(), cast(expected[low:high], WIRE[wire]), f"{wire} of [{low}, {high})")
    whole, param = np.empty(SIZE, WIRE[held]), np.empty(SIZE, np.float32)
    state.read("exp_avg", 0, whole).wait()
    state.read(PARAM, 0, param).wait()
    assert_same_bits(whole, expected)
    assert not param.any(), "what lies beside it is as it was"
    state.close()


@every_order
@pytest.mark.parametrize("name", HELD)
def test_what_is_of_the_same_dtype_keeps_every_bit(engine, order, name) -> None:
    """Of NaN too, wherever no arithmetic is done."""
    dtype = WIRE[name]
    bits = np.random.default_rng(0).integers(0, 256, SIZE * dtype.itemsize, np.uint8).view(dtype)
    state, out = engine(order).allocate({"exp_avg": HELD[name]}, SIZE), np.empty(SIZE, dtype)
    state.write("exp_avg", 0, bits)
    state.read("exp_avg", 0, out).wait()
    assert out.tobytes() == bits.tobytes()
    state.close()


@every_order
@pytest.mark.parametrize("held", HELD)
def test_a_slot_is_replaced_by_one_of_float32(engine, assert_same_bits, order, held) -> None:
    made, values = engine(order), drawn(SIZE)
    state = made.allocate({"exp_avg": HELD[held], PARAM: Precision.FLOAT32}, SIZE)
    staged = made.allocate({"exp_avg": Precision.FLOAT32}, SIZE)
    state.write(PARAM, 0, values[::-1].copy())
    staged.write("exp_avg", 0, values)
    state.adopt(staged)
    out, param = np.empty(SIZE, WIRE[held]), np.empty(SIZE, np.float32)
    state.read("exp_avg", 0, out).wait()
    state.read(PARAM, 0, param).wait()
    assert_same_bits(out, cast(values, WIRE[held]))
    assert_same_bits(param, values[::-1].copy())
    assert staged.nbytes == 0
    state.close()


@pytest.mark.parametrize("slot", ["param", "exp_avg"])
@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 1025), (1024, 1), (1025, 0)])
def test_ranges_outside_are_refused(engine, slot, start, count) -> None:
    state = engine("lazy").allocate({PARAM: Precision.FLOAT32, "exp_avg": Precision.INT8}, 1024)
    for attempt in (state.read, state.write):
        with pytest.raises(IndexError, match="of the state are outside its 1024"):
            attempt(slot, start, np.zeros(count, np.float32))
    state.close()


@every_order
def test_a_read_that_fails_leaves_the_bus_to_others(engine, assert_same_bits, order) -> None:
    made, values = engine(order), drawn(SIZE)
    states = [made.allocate({PARAM: Precision.FLOAT32}, SIZE) for _ in range(2)]
    for state in states:
        state.write(PARAM, 0, values)
    cupy = made._resources.device.cupy
    cupy.fail_next("copy", cupy.cuda.runtime.CUDARuntimeError(98), after=3)
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="invalid device function"):
        states[0].read(PARAM, 0, np.empty(SIZE, np.float32))
    out = np.empty(SIZE, np.float32)
    states[1].read(PARAM, 0, out).wait()
    assert_same_bits(out, values)
    for state in states:
        state.close()


# --- slots of 8 bits ----------------------------------------------------------------------------------------------

BLOCKS_SIZE = 7 * BLOCK + 77
REGIONS = regions_of(
    BLOCKS_SIZE,
    [
        (300, 400, Precision.FLOAT32),
        (400, 512, Precision.BFLOAT16),
        (768, 1024, Precision.FLOAT32),
        (1280, 1281, Precision.BFLOAT16),
    ],
)
SHORT = (BLOCKS_SIZE // BLOCK) * BLOCK
BLOCK_RANGES = [
    (0, 0),
    (0, 1),
    (0, BLOCKS_SIZE),
    (255, 257),
    (299, 301),
    (500, 1030),
    (767, 769),
    (3, 3 + 3 * BLOCK),
    (3, 3 + 5 * BLOCK),
    (SHORT - 1, BLOCKS_SIZE),
    (BLOCKS_SIZE, BLOCKS_SIZE),
]


def moments(name: str, seed: int = 0) -> np.ndarray:
    """Draw what an 8-bit slot holds: blocks of different magnitudes, of zeros, and with the odd ones in them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(BLOCKS_SIZE).astype(np.float32)
    scales = np.float32([1.0, 1e-30, 1e30, 1e-42, 1.0, 0.0, 3.0, 1e5])
    with np.errstate(all="ignore"):
        values *= scales[np.arange(BLOCKS_SIZE) // BLOCK]
    values[4 * BLOCK + 5] = np.nan
    values[6 * BLOCK + 7] = np.inf
    return values if EIGHT_BIT_SLOTS[name] else np.abs(values)


HOLDINGS = pytest.mark.parametrize("holding", [Precision.INT8, REGIONS], ids=["in 8 bits", "mixed"])


def allocate(made: CudaEngine, name: str, holding: Holding = Precision.INT8) -> Any:
    return made.allocate({PARAM: Precision.FLOAT32, name: holding}, BLOCKS_SIZE)


def parts_of(slot: Any) -> list[Any]:
    return [part for _, part in slot.parts] if isinstance(slot, (MixedSlot, CudaMixedSlot)) else [slot]


def arrays_of(slot: Any) -> list[Any]:
    return [slot.codes, slot.absmax] if isinstance(slot, (BlockSlot, CudaBlockSlot)) else [slot.values]


def replace(made: CudaEngine, state: Any, name: str, values: np.ndarray, scale: np.ndarray | None) -> None:
    """Replace a slot as a load does."""
    names = [name] if scale is None else [name, f"{name}_scale"]
    staged = made.allocate(dict.fromkeys(names, Precision.FLOAT32), BLOCKS_SIZE)
    staged.write(name, 0, values)
    if scale is not None:
        staged.write(f"{name}_scale", 0, scale)
    state.adopt(staged)


def odd_scale(name: str) -> np.ndarray:
    """Give each block a maximum that does not fit: too small, zero, infinite, subnormal, NaN, negative, too large."""
    maxima = np.float32([0.5, 0.0, np.inf, 1e-40, 7.0, np.nan, -1.0, 1e6])
    return np.repeat(maxima, BLOCK)[:BLOCKS_SIZE]


@every_order
@HOLDINGS
@pytest.mark.parametrize("name", EIGHT_BIT_SLOTS)
@pytest.mark.parametrize("given", ["no scale", "its own scale", "odd scale"])
def test_8_bit_slots_are_those_of_the_cpu(engine, assert_same_bits, read, order, name, given, holding) -> None:
    made, values = engine(order), moments(name)
    reference = make_slot(name, holding, BLOCKS_SIZE)
    scale: np.ndarray | None = None
    if given == "its own scale":
        first, scale = make_slot(name, holding, BLOCKS_SIZE), np.empty(BLOCKS_SIZE, np.float32)
        first.replace(0, values.copy(), None)
        first.read_scale(0, scale)
        first.read(0, values)
    elif given == "odd scale":
        scale = odd_scale(name)
    reference.replace(0, values.copy(), scale)
    state = allocate(made, name, holding)
    replace(made, state, name, values, scale)
    for own, other in zip(parts_of(state._slots[name]), parts_of(reference), strict=True):
        for array, expected in zip(arrays_of(own), arrays_of(other), strict=True):
            got = read(made._resources.device, array)
            halves = expected.dtype == np.uint16
            assert_same_bits(*((got.view(BFLOAT16), expected.view(BFLOAT16)) if halves else (got, expected)))
    for low, high in BLOCK_RANGES:
        for wire, dtype in WIRE.items():
            got, want = place(high - low, dtype), np.empty(high - low, dtype)
            state.read(name, low, got).wait()
            reference.read(low, want)
            assert_same_bits(got.copy(), want, f"{wire} of [{low}, {high})")
            got, want = place(high - low, dtype), np.empty(high - low, dtype)
            state.read(f"{name}_scale", low, got).wait()
            reference.read_scale(low, want)
            assert_same_bits(got.copy(), want, f"scale in {wire} of [{low}, {high})")
    state.close()


@every_order
def test_8_bit_slots_are_replaced_again_and_begin_as_zeros(engine, assert_same_bits, order) -> None:
    made, name = engine(order), "exp_avg"
    state, reference = allocate(made, name, REGIONS), make_slot(name, REGIONS, BLOCKS_SIZE)
    out = np.empty(BLOCKS_SIZE, np.float32)
    state.read(name, 0, out).wait()
    assert not out.any()
    for seed in range(3):
        values, want = moments(name, seed), np.empty(BLOCKS_SIZE, np.float32)
        reference.replace(0, values.copy(), None)
        replace(made, state, name, values, None)
        state.read(name, 0, out).wait()
        reference.read(0, want)
        assert_same_bits(out, want)
        for low, high, precision in REGIONS:
            if precision is Precision.FLOAT32:
                assert_same_bits(out[low:high], values[low:high], "float32")
    state.close()


@HOLDINGS
def test_8_bit_elements_are_not_written_one_by_one(engine, holding) -> None:
    made = engine("lazy")
    state = allocate(made, "exp_avg", holding)
    with pytest.raises(TypeError, match="8-bit elements are replaced all at once"):
        state.write("exp_avg", 0, np.ones(1, np.float32))
    state.close()


@every_order
def test_regions_of_other_precisions_are_written(engine, assert_same_bits, order) -> None:
    made = engine(order)
    state, reference = allocate(made, "exp_avg", REGIONS), make_slot("exp_avg", REGIONS, BLOCKS_SIZE)
    got, want = np.empty(BLOCKS_SIZE, np.float32), np.empty(BLOCKS_SIZE, np.float32)
    for each in (state, reference):
        values = drawn(150)
        each.write("exp_avg", 310, values) if each is state else each.write(310, values)
    state.read("exp_avg", 0, got).wait()
    reference.read(0, want)
    assert_same_bits(got, want)
    assert want[310:400].any() and want[400:460].any()
    state.close()


def test_nothing_at_all_can_be_replaced(engine) -> None:
    made = engine("lazy")
    state = made.allocate({"exp_avg": Precision.INT8, PARAM: Precision.BFLOAT16}, 0)
    state.adopt(made.allocate({"exp_avg": Precision.FLOAT32, PARAM: Precision.FLOAT32}, 0))
    state.read("exp_avg", 0, np.empty(0, np.float32)).wait()
    state.read("exp_avg_scale", 0, np.empty(0, np.float32)).wait()
    state.close()
