"""Every generated CUDA kernel, run through g++ on arrays of NumPy, against the CPU engine's functions, bit for bit.

Lengths are odd, arrays aligned, aligned after up to three elements, and never; g++ aborts where a vector is not.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stepwire_server.engines.cpu.numpy_kernels import NumpyKernels
from stepwire_server.engines.cuda.source import (
    eight_bit_tables,
    measure_kernel,
    module_source,
    update_kernel,
)
from stepwire_server.engines.int8_moments import (
    BLOCK,
    SIGNED_MAP,
    SIGNED_STEPS,
    UNSIGNED_MAP,
    UNSIGNED_STEPS,
    block_count,
    decode_blocks,
    encode_blocks,
)
from stepwire_server.engines.numpy_reference import measured_slots
from stepwire_server.engines.protocol import GRAIN, PARAM
from stepwire_server.engines.stochastic_rounding import seeds_for
from stepwire_server.rules import EIGHT_BIT_SLOTS, Decay, Precision, Recipe
from tests.server.pretended_gpus import library_of
from tests.support import cuda_cases as cases
from tests.support import cuda_shim as shim

pytestmark = [
    pytest.mark.skipif(shim.COMPILER is None, reason="g++ is not installed; it compiles for the processor"),
    pytest.mark.many,
]

SIZES = [1, 3, 255, 256, 257, 1037, GRAIN + 5]
SIGNS = pytest.mark.parametrize("sign", ["signed", "unsigned"])
GRADIENTS = pytest.mark.parametrize("gradient", cases.WIRE)
NEVER = None
HEADS = [0, 1, 2, 3, NEVER]
NUMPY = NumpyKernels()


@pytest.fixture(scope="module")
def library(kernel_directory: pathlib.Path) -> Any:
    """Every kernel that is tried here."""
    return library_of(cases.KERNELS, kernel_directory)


def placed(values: np.ndarray, elements: int) -> np.ndarray:
    """Copy values to an address that lies some elements past a multiple of 64 bytes."""
    memory = np.zeros(values.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + elements * values.itemsize
    copy = memory[start : start + values.nbytes].view(values.dtype)
    copy[:] = values
    return copy


def arranged(arrays: list[np.ndarray], head: int | None, size: int) -> tuple[list[np.ndarray], np.int64]:
    """Place arrays so that vectors start at the head, or such that none fits all; return what kernels are told."""
    if head is NEVER:
        return [placed(array, 1 + k % 3) for k, array in enumerate(arrays)], np.int64(size)
    return [placed(array, -head % 4) for array in arrays], np.int64(min(head, size))


def data_of(recipe: Recipe, gradient: str, size: int, odd: bool) -> dict[str, list[np.ndarray]]:
    """Make the arrays of a recipe as they are held, a list a slot, and the gradient in its wire dtype."""
    made, held = cases.make_arrays(recipe, size, odd), {}
    with np.errstate(all="ignore"):
        for name, values in made.items():
            held[name] = [values]
            if name in recipe.rule.slots and recipe.precision is Precision.BFLOAT16:
                held[name] = [values.astype(ml_dtypes.bfloat16).view(np.uint16)]
            if name in recipe.rule.slots and recipe.precision is Precision.INT8:
                held[name] = list(encode_blocks(values, EIGHT_BIT_SLOTS[name]))
        held["gradient"] = [made["gradient"].astype(cases.WIRE[gradient])]
    return held


def stored(array: np.ndarray) -> np.ndarray:
    """View an array as kernels take it."""
    return array.view(np.uint16) if array.itemsize == 2 else array


def assert_same(got: np.ndarray, want: np.ndarray, message: str) -> None:
    """Compare bit by bit; any NaN of a float equals any other, halves are those of bfloat16 or as they are typed."""
    if want.dtype == np.uint16:
        got, want = got.view(ml_dtypes.bfloat16), want.view(ml_dtypes.bfloat16)
    if want.dtype == np.uint8:
        assert np.array_equal(got, want), message
    else:
        cases.assert_same_bits(got.copy(), want, message)


def scalars_of(step: Any) -> list[np.float32]:
    return [np.float32(scalar) for scalar in step.scalars]


@functools.cache
def name_of(case: cases.Case) -> str:
    """Return the name of a case's kernel, without writing its text each time."""
    return update_kernel(*case).name


def check_update(library: Any, case: Any, size: int, head: int | None, odd: bool, blocks: int = 2) -> None:
    """Compare one launch of an update."""
    recipe, gradient, reply = case
    step, data = cases.step_of(recipe), data_of(recipe, gradient, size, odd)
    state = [array.copy() for slot in (PARAM, *recipe.slots) for array in data[slot]]
    reply_dtype = None if reply is None else cases.WIRE[reply]
    out = None if reply_dtype is None else np.zeros(size, reply_dtype)
    seeds = seeds_for(step.seed, len(recipe.rule.slots)) if recipe.precision is Precision.BFLOAT16 else ()

    by_element = [stored(array) for array in [*state, data["gradient"][0], *([] if out is None else [out])]]
    pointers, told = arranged(by_element, head, size)
    sums = np.full((len(recipe.sums), blocks), np.nan)
    arguments = [*pointers, *([sums] if recipe.measures else [])]
    arguments += [eight_bit_tables()] if recipe.precision is Precision.INT8 else []
    arguments += [np.int64(size), told, *(np.uint32(seed) for seed in seeds), *scalars_of(step)]
    library.launch(name_of(case), blocks, 256, tuple(arguments))

    wanted_sums = np.zeros(len(recipe.sums))
    ranges = (0, 0, 0, size, *([wanted_sums] if recipe.measures else []))
    NUMPY.update(recipe, data["gradient"][0].dtype, reply_dtype)(
        *state, data["gradient"][0], out, *ranges, *seeds, *step.scalars
    )
    for k, want in enumerate(state):
        assert_same(pointers[k], want, f"array {k} of {size} after a head of {head}")
    if out is not None:
        assert_same(pointers[-1].view(reply_dtype), out, f"answer of {size} after a head of {head}")
    if recipe.measures and not odd:
        assert sums.sum(axis=1) == pytest.approx(wanted_sums, rel=1e-5)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_updates_are_those_of_numpy(library, case) -> None:
    for head, odd in itertools.product(HEADS, (False, True)):
        check_update(library, case, 1037, head, odd)
    for size, head in [(1, 0), (3, 2), (257, 3)]:
        check_update(library, case, size, head, odd=True, blocks=1)


FULLY = [
    cases.Case(Recipe(cases.RULES[0], Decay.NONE, *[options] * 4, precision), gradient, reply)
    for options, precision, gradient, reply in [
        (False, Precision.FLOAT32, "float32", "float32"),
        (True, Precision.BFLOAT16, "bfloat16", "float16"),
        (True, Precision.INT8, "float16", "bfloat16"),
    ]
]


@pytest.fixture(scope="module")
def fully(kernel_directory: pathlib.Path) -> Any:
    return shim.Library(module_source([update_kernel(*case) for case in FULLY]), kernel_directory)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", FULLY, ids=lambda case: case.name)
def test_updates_of_any_size_are_those_of_numpy(fully, case, size) -> None:
    for head, odd in itertools.product(HEADS, (False, True)):
        check_update(fully, case, size, head, odd, blocks=1 + size % 3)


@pytest.mark.parametrize("recipe", cases.PLAIN, ids=lambda recipe: recipe.name)
def test_first_updates_are_the_formula_up_to_its_roundings(library, recipe) -> None:
    """As in `test_ulps`: from zero, within 5.5 units in the last place of the update evaluated in float64."""
    size, random, step = 1037, np.random.default_rng(8), cases.step_of(recipe, 1)
    scalars = dict(zip(recipe.scalars, step.scalars, strict=True)) | {"factor": 1.0, "clip": 1.0}
    gradient = (random.standard_normal(size) * 10.0 ** random.uniform(-10, 4, size)).astype(np.float32)
    zeros = [np.zeros(size, np.float32) for _ in (PARAM, *recipe.slots)]
    arrays, head = arranged([*zeros, gradient, np.empty(size, np.float32)], 1, size)
    numbers = [np.int64(size), head, *(np.float32(scalars[name]) for name in recipe.scalars)]
    library.launch(update_kernel(recipe, "float32", "float32").name, 3, 256, (*arrays, *numbers))
    values = dict.fromkeys(("p", *recipe.slots.values()), np.zeros(size)) | {"g": gradient.astype(np.float64)}
    exact = recipe.evaluate(recipe.stages, values | scalars)["p"]
    ulps = np.abs(arrays[-1] - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert ulps.max() <= 5.5
    assert np.array_equal(arrays[0], arrays[-1])


@pytest.mark.parametrize(("recipe", "gradient"), cases.MEASURED, ids=lambda value: getattr(value, "name", value))
def test_measures_are_those_of_numpy(library, recipe, gradient) -> None:
    name, step = measure_kernel(recipe, gradient).name, cases.step_of(recipe)
    tables = [eight_bit_tables()] if recipe.precision is Precision.INT8 else []
    for size, head, odd in [(1, 0, False), (257, 1, True), (1037, NEVER, False), (3 * GRAIN + 5, 0, False)]:
        data = data_of(recipe, gradient, size, odd)
        state = [array for slot in (PARAM, *measured_slots(recipe)) for array in data[slot]]
        pointers, _ = arranged([stored(array) for array in [*state, data["gradient"][0]]], head, size)
        got, want = np.full((2, -(-size // GRAIN)), np.nan), np.zeros((2, -(-size // GRAIN)))
        library.launch(name, 2, 256, (*pointers, got, *tables, np.int64(size), *scalars_of(step)[:-1]))
        every = [array for slot in (PARAM, *recipe.slots) for array in data[slot]]
        NUMPY.measure(recipe, data["gradient"][0].dtype)(
            *every, data["gradient"][0], 0, 0, 0, size, GRAIN, want, *step.scalars[:-1]
        )
        cases.assert_same_bits(got, want, f"sums of {size}")


@GRADIENTS
@pytest.mark.parametrize("size", [*SIZES, 4096, 3 * GRAIN])
def test_sums_are_those_of_numpy(library, gradient, size) -> None:
    for head, odd, accumulates in itertools.product((0, 1, NEVER), (False, True), (False, True)):
        data = data_of(Recipe(cases.RULES[0], accumulates=True), gradient, size, odd)
        arrays = [*(data["grad_accumulation"] if accumulates else []), data["gradient"][0]]
        pointers, _ = arranged([stored(array) for array in arrays], head, size)
        got, want = np.full((1, -(-size // GRAIN)), np.nan), np.zeros((1, -(-size // GRAIN)))
        name = f"sum_accumulated_{gradient}" if accumulates else f"sum_{gradient}"
        library.launch(name, 1 + size % 2, 256, (*pointers, got, np.int64(size), np.float32(-0.3)))
        NUMPY.sum_of_squares(arrays[-1].dtype, accumulates)(*arrays, 0, 0, 0, size, GRAIN, want, -0.3)
        cases.assert_same_bits(got, want, f"sum of {size}")


def test_a_sum_of_nothing_but_infinite_factors_takes_no_element_past_the_end(library) -> None:
    got = np.full(1, np.nan)
    arguments = (np.ones(5, np.float32), got, np.int64(5), np.float32(np.inf))
    library.launch("sum_float32", 1, 256, arguments)
    assert got.tolist() == [np.inf]


@GRADIENTS
@pytest.mark.parametrize("size", SIZES)
def test_accumulation_is_that_of_numpy(library, gradient, size) -> None:
    for head, odd in itertools.product(HEADS, (False, True)):
        data = data_of(Recipe(cases.RULES[0], accumulates=True), gradient, size, odd)
        accumulated, chunk = data["grad_accumulation"][0], data["gradient"][0]
        pointers, told = arranged([accumulated, stored(chunk)], head, size)
        library.launch(f"accumulate_{gradient}", 2, 256, (*pointers, np.int64(size), told, np.float32(0.7)))
        NUMPY.accumulate(chunk.dtype)(accumulated, chunk, 0, 0, size, 0.7)
        cases.assert_same_bits(pointers[0].copy(), accumulated, f"of {size}")


def of_every_kind(name: str) -> np.ndarray:
    """Return all halves there are, or floats: odd ones, those between halves, and random patterns."""
    dtype = cases.WIRE[name]
    if dtype.itemsize == 2:
        return np.arange(1 << 16, dtype=np.uint16).view(dtype)
    halves = [np.arange(1 << 16, dtype=np.uint16).view(cases.WIRE[half]) for half in ("bfloat16", "float16")]
    patterns = np.concatenate([half.astype(np.float32).view(np.uint32) for half in halves])
    between = [patterns + np.uint32(step) for step in (0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001)]
    random = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32)
    odd = np.array([*cases.ODD, -1e-45], np.float32).view(np.uint32)
    return np.concatenate([odd, random, patterns, *between]).view(np.float32)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(cases.WIRE, 2)))
def test_conversions_are_those_of_numpy(library, source, target) -> None:
    every = of_every_kind(source)
    for size, head in [*itertools.product((1, 3, 255, 1037), (0, 1, NEVER)), (len(every), 0), (len(every) - 1, NEVER)]:
        values = every[:size]
        with np.errstate(all="ignore"):
            want = values.astype(np.float32).astype(cases.WIRE[target])
        pointers, _ = arranged([stored(values), stored(np.empty_like(want))], head, size)
        library.launch(f"convert_{source}_to_{target}", 2, 256, (*pointers, np.int64(size)))
        cases.assert_same_bits(pointers[1].view(want.dtype).copy(), want, f"{size} from {head}")


def blocks_of(size: int, sign: str, odd: bool) -> np.ndarray:
    """Return values of many magnitudes; `odd` makes some blocks infinite, zero, or subnormal."""
    random = np.random.default_rng(size)
    values = (random.standard_normal(size) * np.exp(random.uniform(-18, 2, size))).astype(np.float32)
    if odd:
        places = random.choice(size, size // 700 + 1, replace=False)
        values[places] = random.choice(np.array(cases.ODD, np.float32), len(places))
        values[: min(BLOCK, size)] *= np.float32(1e-42)
        values[2 * BLOCK : 3 * BLOCK] = -0.0
    return values if sign == "signed" else np.abs(values)


def encode(library: Any, name: str, arrays: list[np.ndarray], head: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Launch a kernel that encodes; return codes and maxima."""
    size = len(arrays[0])
    pointers, _ = arranged([*arrays, np.full(size, 77, np.uint8)], head, size)
    absmax = np.full(block_count(size), 77, np.float32)
    library.launch(name, 1 + size % 3, 256, (*pointers, absmax, eight_bit_tables(), np.int64(size)))
    return pointers[-1], absmax


@SIGNS
@pytest.mark.parametrize("size", SIZES)
def test_blocks_are_encoded_and_decoded_as_by_numpy(library, sign, size) -> None:
    for head, odd in itertools.product((0, 1, NEVER), (False, True)):
        values = blocks_of(size, sign, odd)
        codes, absmax = encode_blocks(values, sign == "signed")
        got_codes, got_absmax = encode(library, f"encode_{sign}_blocks", [values], head)
        assert np.array_equal(got_codes, codes)
        assert np.array_equal(got_absmax.view(np.uint32), absmax.view(np.uint32))
        (given, decoded), _ = arranged([codes, np.empty(size, np.float32)], head, size)
        arguments = (given, absmax, decoded, eight_bit_tables(), np.int64(size))
        library.launch(f"decode_{sign}_blocks", 2, 256, arguments)
        cases.assert_same_bits(decoded.copy(), decode_blocks(codes, absmax, sign == "signed"))


@SIGNS
@pytest.mark.parametrize("size", SIZES)
def test_blocks_are_encoded_with_given_maxima_as_by_numpy(library, sign, size) -> None:
    odd = np.array([*cases.ODD, -np.nan, 2.0**-100, 7.8886e-31, -1.0, 1.0, 0.5], np.float32)
    for head in (0, 1, NEVER):
        values = blocks_of(size, sign, head == 1)
        scale = np.repeat(np.random.default_rng(size).choice(odd, block_count(size)), BLOCK)[:size].copy()
        codes, got_absmax = encode(library, f"encode_{sign}_with", [values, scale], head)
        expected, absmax = encode_blocks(values, sign == "signed", scale[::BLOCK].copy())
        assert np.array_equal(codes, expected)
        assert np.array_equal(got_absmax.view(np.uint32), absmax.view(np.uint32))


def patterns_of(sign: str) -> Iterator[np.ndarray]:
    """Yield every pattern near an edge of a cell or a boundary between codes, and random ones."""
    near = np.arange(-2, 3)
    cells = np.arange(1 << 16, dtype=np.int64)[:, None] << 16
    values = (SIGNED_MAP if sign == "signed" else UNSIGNED_MAP).astype(np.float64)
    middles = ((values[1:] + values[:-1]) / 2.0).astype(np.float32).view(np.uint32).astype(np.int64)[:, None]
    yield ((cells + near) & 0xFFFFFFFF).ravel().astype(np.uint32)
    yield np.concatenate([((middles + near) ^ flip).ravel() for flip in (0, 1 << 31)]).astype(np.uint32)
    yield np.random.default_rng(3).integers(0, 1 << 32, 500_000, np.uint32)


@SIGNS
@pytest.mark.parametrize("largest", [2.0**-100, 1e-20, 1.0, 1e30, 2.0**127, 3.4028235e38])
def test_values_far_below_the_maximum_are_encoded_as_by_numpy(library, sign, largest) -> None:
    """Without signs, zero alone has the code of zero, whether products are tiny or underflow."""
    tiny = np.float32([2.0**-149, 1e-40, 2.0**-126, 1e-30, 1e-10, 1e-8, 1.6e-7])
    tiny = np.concatenate([tiny, -tiny, tiny * np.float32(min(largest, 1e30)), [0.0, -0.0]])
    values = np.concatenate([[largest], tiny]).astype(np.float32)
    codes, absmax = encode(library, f"encode_{sign}_blocks", [values], 0)
    expected, expected_absmax = encode_blocks(values, sign == "signed")
    assert codes.tolist() == expected.tolist() and absmax.tolist() == expected_absmax.tolist()
    assert sign == "signed" or ((codes == 0) == (values == 0.0)).all()


@SIGNS
def test_clamped_look_ups_give_the_codes_of_the_full_tables(library, sign) -> None:
    """All 2³² patterns were compared once, by hand; see `cuda_dynamic_code`."""
    for patterns in patterns_of(sign):
        values = patterns.view(np.float32)
        codes, _ = encode(library, f"encode_{sign}_with", [values, np.ones_like(values)], 0)
        assert np.array_equal(codes, full_table_codes(patterns, sign))


def full_table_codes(patterns: np.ndarray, sign: str) -> np.ndarray:
    if sign == "unsigned":
        kept = patterns & np.uint32(0x7FFFFFFF)
        return ((UNSIGNED_STEPS[kept >> 16] + kept) >> 17).astype(np.uint8)
    keys = np.where(patterns >> 31, patterns ^ np.uint32(0x7FFFFFFF), patterns)
    return ((SIGNED_STEPS[keys >> 17] + keys) >> 18).astype(np.uint8)


def test_the_tables_fit_into_shared_memory() -> None:
    """Both maps and the windows of both kinds of steps take what Turing has for two blocks of threads."""
    assert eight_bit_tables().dtype == np.uint32
    assert eight_bit_tables().nbytes <= 28 * 1024


WRONG = """
extern "C" __global__ void {name}(const float *from, float *to) {{
    {body}
}}
"""


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("load_four(from + 1, to);", "a load is not aligned"),
        ("store_four(to + 1, from);", "a store is not aligned"),
        ("if (threadIdx.x != 3) __syncthreads();", "lanes of a warp wait for one another in vain"),
        ("if (threadIdx.x < 64) __syncthreads();", "warps wait for one another in vain"),
        ("if (threadIdx.x % 2) __shfl_xor_sync(0xFFFFFFFFu, 1u, 1);", "lanes of a warp wait for one another in vain"),
    ],
)
def test_the_shim_notices(tmp_path, body, complaint) -> None:
    """It aborts, so it is tried in a process of its own."""
    (tmp_path / "text").write_text(module_source([]) + WRONG.format(name="wrong", body=body))
    script = (
        f"import pathlib, numpy as np\n"
        f"from tests.support import cuda_shim as shim\n"
        f"directory = pathlib.Path({str(tmp_path)!r})\n"
        f"library = shim.Library((directory / 'text').read_text(), directory)\n"
        f"memory = np.zeros(64, np.float32)\n"
        f"start = -memory.ctypes.data % 64 // 4\n"
        f"library.launch('wrong', 1, 256, (memory[start:], memory[start:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and complaint in done.stderr
