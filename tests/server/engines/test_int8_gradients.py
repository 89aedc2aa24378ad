"""A step with a gradient in blocks of 8 bits is, bit for bit, the step with the decoded gradient in float32.

Both CPU engines keep to that, wherever a range begins and ends, and however it is cut into chunks. NumPy does the
steps with the decoded gradient: Numba's kernels take long to compile, and `test_parity` shows that they give the same
bits. `cuda/test_int8_gradients` has the GPU's kernels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stepwire.wire.int8_blocks import BLOCK, INT8, decode_blocks, encode_blocks
from stepwire_server.engines import PARAM, CpuEngine
from stepwire_server.engines.protocol import EngineState, Gradient
from stepwire_server.rules import ALL_RULES, EIGHT_BIT_SLOTS, Decay, Precision, Recipe
from tests.support import cuda_cases as cases
from tests.support.pairwise import combinations, covering, missing, pairwise

pytestmark = pytest.mark.many

FLOAT32 = np.dtype(np.float32)
RULES = list({rule.update: rule for rule in ALL_RULES}.values())
FULL = dict.fromkeys(cases.FLAGS, True)
PLAIN = [Recipe(rule) for rule in RULES]
WHOLE = [Recipe(RULES[0], Decay.BEFORE, **FULL), Recipe(RULES[0], Decay.AFTER, precision=Precision.INT8, **FULL)]
OPTIONS = [
    *WHOLE,
    Recipe(RULES[0], precision=Precision.BFLOAT16),
    *(Recipe(rule, precision=Precision.INT8) for rule in RULES if set(rule.slots) <= EIGHT_BIT_SLOTS.keys()),
]
PARAMETERS = {
    "rule": RULES,
    "decay": list(Decay),
    **dict.fromkeys(cases.FLAGS, (False, True)),
    "precision": list(Precision),
}
ROWS = pairwise(PARAMETERS, allowed=cases.is_served)
# Blocks are decoded before a kernel's loop, in which rule and decay then have float32. So the shape of the loop matters
# to a compiled kernel: the precision of the state, and each option in it.
SHAPES = [
    pair for flag in cases.FLAGS for pair in combinations({name: PARAMETERS[name] for name in ("precision", flag)})
]
COMPILED = covering(ROWS, SHAPES)
NUMBA, NUMPY = ([Recipe(**row) for row in rows] for rows in (COMPILED, ROWS))
UPDATES = [
    *(pytest.param("numba", recipe, marks=pytest.mark.slow) for recipe in dict.fromkeys([*NUMBA, *WHOLE])),
    *(("numpy", recipe) for recipe in dict.fromkeys([*NUMPY, *PLAIN, *OPTIONS])),
]
LAYERWISE = [recipe for recipe in PLAIN if recipe.rule.direction is not None]
MEASURES = [("numba", LAYERWISE[0]), *(("numpy", recipe) for recipe in LAYERWISE)]
SIZE = 9_333


@pytest.fixture(scope="module", params=["numba", "numpy"])
def engine(request: pytest.FixtureRequest) -> Iterator[CpuEngine]:
    if request.param == "numba":
        pytest.importorskip("numba")
    made = CpuEngine(threads=2, use_numba=request.param == "numba")
    yield made
    made.close()


@pytest.fixture(scope="module")
def reference() -> Iterator[CpuEngine]:
    """The engine that is given the decoded gradient."""
    made = CpuEngine(threads=2, use_numba=False)
    yield made
    made.close()


def blocks_of(values: np.ndarray) -> np.ndarray:
    """Encode values, and lay the blocks where no message is aligned."""
    blocks = np.empty(-(-len(values) // BLOCK), INT8)
    encode_blocks(values, blocks)
    return cases.unaligned(blocks)


def received(blocks: np.ndarray, count: int, *states: EngineState) -> tuple[Gradient, Gradient]:
    """Put a chunk into the first state as blocks, and into the last one decoded."""
    floats = cases.unaligned(decode_blocks(blocks, count))
    return states[0].receive().put(0, blocks, count), states[-1].receive().put(0, floats)


def of_gradient(size: int = SIZE, odd: bool = True) -> np.ndarray:
    """Encode a gradient among whose blocks there are empty, infinite, subnormal and large ones, and −128 as a code."""
    values = (np.random.default_rng(size).standard_normal(size) / 10.0).astype(np.float32)
    if odd:
        values[BLOCK : 2 * BLOCK] = 0.0
        values[3 * BLOCK + 5] = np.inf
        values[4 * BLOCK + 7] = np.nan
        values[6 * BLOCK : 7 * BLOCK] *= np.float32(1e-40)
        values[7 * BLOCK] = np.finfo(np.float32).max
    blocks = np.array(blocks_of(values))
    blocks["codes"][0, :3] = -128
    return blocks


def ranges_of(recipe: Recipe, size: int) -> list[tuple[int, int, int]]:
    """Return where ranges start in the state, and where they begin and end in a chunk."""
    if recipe.precision is Precision.INT8:
        return [(0, 0, size), (512, 256, 256 * 9), (256, 0, 255), (256, 5, size - 256)]
    return [(0, 0, size), (3, 1, size - 2), (0, 255, 257), (7, 300, 301), (0, 511, 4500), (9, 9, 9)]


def test_updates_have_every_pair_of_values() -> None:
    """NumPy, which compiles nothing, has all pairs; Numba has every option in every precision."""
    assert missing(combinations(PARAMETERS, allowed=cases.is_served), ROWS) == []
    assert missing(SHAPES, COMPILED) == []
    assert {recipe.rule.update for recipe in NUMPY} == {rule.update for rule in ALL_RULES}


@pytest.mark.parametrize(
    ("engine", "recipe"), UPDATES, indirect=["engine"], ids=lambda each: getattr(each, "name", each)
)
def test_an_update_is_that_of_the_decoded_gradient(engine: CpuEngine, reference: CpuEngine, recipe: Recipe) -> None:
    """Sums of telemetry are the same numbers of one engine, and nearly the same of two."""
    arrays, step, blocks = cases.make_arrays(recipe, SIZE, odd=False), cases.step_of(recipe), of_gradient()
    compiled = type(engine._kernels) is not type(reference._kernels)
    decoding = reference if compiled and recipe not in WHOLE else engine
    for start, begin, end in ranges_of(recipe, SIZE):
        results = []
        for which, each in enumerate((engine, decoding)):
            state, out = cases.filled(each, recipe, arrays), np.empty(end - begin, np.float32)
            chunk = received(blocks, SIZE, state)[which]
            assert len(chunk) == SIZE
            sums = state.update(step, start, chunk, begin, end, out).wait()
            results.append((cases.everything_of(state, recipe, SIZE) | {"out": out}, sums))
        for name, want in results[1][0].items():
            cases.assert_same_bits(results[0][0][name], want, f"{name} of [{begin}, {end})")
        if decoding is engine:
            cases.assert_same_numbers(results[0][1], results[1][1])
        assert results[0][1] == pytest.approx(results[1][1], rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("accumulates", [False, True])
def test_sums_and_elements_are_those_of_the_decoded_gradient(
    engine: CpuEngine, reference: CpuEngine, accumulates: bool
) -> None:
    size = 140_001
    recipe, blocks = Recipe(RULES[0], accumulates=True), of_gradient(size, odd=False)
    arrays = cases.make_arrays(recipe, size, odd=False)
    states = [cases.filled(each, recipe, arrays) for each in (engine, reference)]
    for begin, end in [(0, size), (1, 2), (255, 70_000), (65_536, size), (300, 140_000), (4, 4)]:
        at = begin if accumulates else None
        sums, fetched = [], []
        for state, chunk in zip(states, received(blocks, size, *states), strict=True):
            sums.append(state.sum_of_squares(chunk, begin, end, 0.3, at).wait())
            fetched.append(state.fetch(chunk, begin, end, 0.3, at))
        assert sums[0] == sums[1] and (sums[0] > 0.0) == (begin < end)
        cases.assert_same_bits(*fetched)


def test_a_sum_is_not_finite_where_a_block_is_not(engine: CpuEngine) -> None:
    state = engine.allocate({PARAM: Precision.FLOAT32}, SIZE)
    chunk, _ = received(of_gradient(), SIZE, state)
    finite = [
        math.isfinite(state.sum_of_squares(chunk, low, min(low + BLOCK, SIZE), 1.0).wait())
        for low in range(0, SIZE, BLOCK)
    ]
    assert [block for block, whole in enumerate(finite) if not whole] == [3, 4]


def test_accumulation_is_that_of_the_decoded_gradient(engine: CpuEngine, reference: CpuEngine) -> None:
    recipe, blocks = Recipe(RULES[0], accumulates=True), of_gradient()
    arrays, results = cases.make_arrays(recipe, SIZE, odd=False), []
    for which, each in enumerate((engine, reference)):
        state = cases.filled(each, recipe, arrays)
        for start, begin, end in ranges_of(recipe, SIZE):
            state.accumulate(start, received(blocks, SIZE, state)[which], begin, end, 0.7)
        results.append(cases.everything_of(state, recipe, SIZE)["grad_accumulation"])
    cases.assert_same_bits(*results)


@pytest.mark.parametrize(
    ("engine", "recipe"), MEASURES, indirect=["engine"], ids=lambda each: getattr(each, "name", each)
)
def test_what_is_measured_is_that_of_the_decoded_gradient(
    engine: CpuEngine, reference: CpuEngine, recipe: Recipe
) -> None:
    arrays = cases.make_arrays(recipe, SIZE, odd=False)
    states = [cases.filled(each, recipe, arrays) for each in (engine, reference)]
    step, blocks = cases.step_of(recipe), of_gradient(odd=False)
    for start, begin, end in ranges_of(recipe, SIZE):
        measured, directions = [], []
        for state, chunk in zip(states, received(blocks, SIZE, *states), strict=True):
            measured.append(state.measure(step, start, chunk, begin, end).wait())
            directions.append(state.fetch_direction(step, start, chunk, begin, end))
        assert measured[0] == measured[1] and len(directions[0]) == end - begin
        cases.assert_same_bits(*directions)


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.INT8])
def test_chunks_change_no_bit(engine: CpuEngine, precision: Precision) -> None:
    recipe, blocks = next(recipe for recipe in NUMBA if recipe.precision is precision), of_gradient()
    arrays, step, results = cases.make_arrays(recipe, SIZE, odd=False), cases.step_of(recipe), []
    for cuts in ([], [256], [256, 512, 4096, 9216]):
        state, out = cases.filled(engine, recipe, arrays), np.empty(SIZE, np.float32)
        with_ends = [0, *cuts, SIZE]
        buffer = state.receive()
        for low, high in zip(with_ends[:-1], with_ends[1:], strict=True):
            part = cases.unaligned(blocks[low // BLOCK : -(-high // BLOCK)])
            state.update(step, low, buffer.put(low, part, high - low), 0, high - low, out[low:high]).wait()
        results.append(cases.everything_of(state, recipe, SIZE) | {"out": out})
    for other in results[1:]:
        for name, want in results[0].items():
            cases.assert_same_bits(other[name], want, name)


def test_threads_change_no_bit() -> None:
    pytest.importorskip("numba")
    size = 400_003
    recipe = next(each for each in NUMBA if each.accumulates and each.precision is Precision.FLOAT32)
    arrays, blocks, results = cases.make_arrays(recipe, size, odd=False), of_gradient(size, odd=False), []
    for threads in (1, 3):
        engine = CpuEngine(threads, use_numba=True)
        state = cases.filled(engine, recipe, arrays)
        chunk, _ = received(blocks, size, state)
        state.accumulate(2, chunk, 3, size, 0.3)
        state.update(cases.step_of(recipe), 5, chunk, 7, size - 9, np.empty(size - 16, np.float32)).wait()
        results.append(cases.everything_of(state, recipe, size))
        engine.close()
    for name, want in results[0].items():
        cases.assert_same_bits(results[1][name], want, name)


def test_a_chunk_has_as_many_elements_as_is_said(engine: CpuEngine) -> None:
    state = engine.allocate({PARAM: Precision.FLOAT32}, SIZE)
    blocks = blocks_of(np.ones(300, np.float32))
    chunk = state.receive().put(0, blocks, 300)
    assert (len(chunk), chunk.dtype) == (300, INT8)
    assert len(state.receive().put(0, blocks)) == 512
    assert state.sum_of_squares(chunk, 0, 300, 1.0).wait() == 300.0
    for call in (
        lambda: state.receive().put(0, blocks, 513),
        lambda: state.sum_of_squares(chunk, 0, 301, 1.0),
        lambda: state.fetch(chunk, 0, 301, 1.0),
    ):
        with pytest.raises(IndexError):
            call()


def test_the_loops_over_codes_and_elements_are_vectorised(tmp_path: Any) -> None:
    numba_kernels = pytest.importorskip("stepwire_server.engines.cpu.numba_kernels", exc_type=ImportError)
    kernel = numba_kernels.NumbaKernels(tmp_path).update(Recipe(RULES[0]), INT8, FLOAT32)
    (code,) = kernel.inspect_llvm().values()
    for operation in (r"sitofp <\d+ x i8>", r"fdiv <\d+ x float>"):
        assert re.search(operation, code), operation
