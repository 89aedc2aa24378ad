"""Recipes and data that the CUDA kernels are tried with, on the processor and on a GPU, and what is compared."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from stepwire.optimizers import Hyperparameters
from stepwire.wire.int8_blocks import BLOCK, INT8, encode_blocks
from stepwire_server.engines.cuda.source import measure_kernel, update_kernel
from stepwire_server.engines.protocol import PARAM, Engine, EngineState, Pass
from stepwire_server.engines.regions import Holding, Region
from stepwire_server.rules import ALL_RULES, EIGHT_BIT_SLOTS, Decay, Precision, Recipe
from tests.support import telemetry_cases
from tests.support.pairwise import Row, pairwise

WIRE = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
GRADIENTS = [*WIRE, "int8"]
RULES = list({rule.update: rule for rule in ALL_RULES}.values())
EIGHT_BIT_RULES = [rule for rule in RULES if set(rule.slots) <= EIGHT_BIT_SLOTS.keys()]
SEED = 0xDEADBEEF
NUMBERS = Hyperparameters(
    lr=0.02,
    beta1=0.9,
    beta2=0.99,
    eps=1e-6,
    weight_decay=0.1,
    momentum=0.8,
    dampening=0.1,
    alpha=0.95,
    decay=0.01,
    trust_coefficient=0.5,
    eps_root=1e-8,
)
SIGNED = {PARAM, "gradient", "exp_avg", "momentum_buffer", "grad_avg", "grad_accumulation", "param_average"}
ODD = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 1e-40, 3e38, -3e38, 1e-20, 1e20, 65519.0, 65520.0, 6e-8]
# Elements in all, where the range starts among them and in the gradient, and where it ends there. Ranges of 8 bits
# start at a block, and end at one or with everything.
SIZES = [(1, 0, 0, 1), (3, 1, 0, 2), (1037, 2, 1, 1036), (5, 2, 2, 2)]
EIGHT_BIT_SIZES = [(1, 0, 0, 1), (300, 256, 1, 45), (1037, 512, 4, 529), (1037, 256, 1, 513), (5, 0, 2, 2)]


class Case(NamedTuple):
    """A kernel: a recipe with a gradient's dtype and a reply's, None for no reply."""

    recipe: Recipe
    gradient: str
    reply: str | None

    @property
    def name(self) -> str:
        return f"{self.recipe.name}-{self.gradient}-{self.reply}"


PLAIN = [Recipe(rule) for rule in RULES]
FLAGS = ("accumulates", "limits", "averages", "measures")
PARAMETERS = {
    "rule": RULES,
    "decay": [decay for decay in Decay if decay is not Decay.APART],  # BEFORE has its place, and stands for it
    **dict.fromkeys(FLAGS, (False, True)),
    "precision": list(Precision),
    "gradient": list(WIRE),
    "reply": [None, *WIRE],
}
WHOLLY = [(*FLAGS, "precision")]
"""Every set of flags occurs in every precision."""


def is_served(row: Row) -> bool:
    """Tell whether a rule's slots can all be held as the row asks, and no decay comes beside a rule with its own."""
    rule, decay = row.get("rule", RULES[0]), row.get("decay", Decay.NONE)
    held = row.get("precision") is not Precision.INT8 or rule in EIGHT_BIT_RULES
    return held and (decay is Decay.NONE or rule.direction is None)


def _row(case: Case) -> Row:
    recipe = case.recipe
    flags = {flag: getattr(recipe, flag) for flag in FLAGS}
    held = {"precision": recipe.precision, "gradient": case.gradient, "reply": case.reply}
    return {"rule": recipe.rule, "decay": recipe.decay, **flags, **held}


def rows_of(cases: list[Case]) -> list[Row]:
    """Return the values of the parameters in some cases."""
    return [_row(case) for case in cases]


def _cases() -> list[Case]:
    """Return every rule alone; every pair of values of two parameters without 8 bits; and every pair with them."""
    precise = PARAMETERS | {"precision": [Precision.FLOAT32, Precision.BFLOAT16]}
    rows = rows_of([Case(recipe, "float32", "float32") for recipe in PLAIN])
    rows = pairwise(PARAMETERS, WHOLLY, is_served, pairwise(precise, WHOLLY, is_served, rows))
    return [Case(Recipe(*list(row.values())[:-2]), row["gradient"], row["reply"]) for row in rows]


def _forgetful(name: str, decay: Decay = Decay.NONE, precision: Precision = Precision.FLOAT32) -> Case:
    rule = next(rule for rule in ALL_RULES if rule.name == name)
    slots = tuple(slot for slot, _ in rule.means)
    return Case(Recipe(rule, decay, precision=precision, forgotten=slots), "float32", "float32")


FURTHER = [
    Case(Recipe(RULES[0], Decay.APART), "float32", "float32"),
    _forgetful("adam_torch", Decay.WITHIN),
    _forgetful("nadam", precision=Precision.INT8),
    _forgetful("rmsprop_centered_momentum", precision=Precision.BFLOAT16),
]
CASES = [*_cases(), *FURTHER]
LAYERWISE = [case for case in CASES if case.recipe.rule.direction is not None]
_ALL = (True, True, True, True)
IN_BLOCKS = [
    Case(Recipe(RULES[0]), "int8", "float32"),
    Case(Recipe(RULES[0]), "int8", None),
    Case(Recipe(RULES[0], Decay.BEFORE, precision=Precision.BFLOAT16), "int8", "bfloat16"),
    Case(Recipe(RULES[0], Decay.AFTER, *_ALL), "int8", "float16"),
    Case(Recipe(RULES[0], precision=Precision.INT8), "int8", "bfloat16"),
    Case(Recipe(RULES[0], Decay.GRADIENT, *_ALL, Precision.INT8), "int8", "float32"),
    *(
        Case(Recipe(rule, precision=precision), "int8", "float32")
        for rule in ALL_RULES
        for precision in (Precision.FLOAT32, Precision.INT8)
        if rule.name in ("lamb", "lion")
    ),
]
"""Gradients in blocks of 8 bits: a kernel reads them so, whatever else it does."""

LAYERWISE_IN_BLOCKS = [case for case in IN_BLOCKS if case.recipe.rule.direction is not None]
MEASURED = [(case.recipe, case.gradient) for case in LAYERWISE]
OWN = [
    Recipe(ALL_RULES[0]),
    Recipe(ALL_RULES[0], precision=Precision.BFLOAT16),
    Recipe(ALL_RULES[0], measures=True, precision=Precision.INT8),
    Recipe(ALL_RULES[0], accumulates=True, averages=True),
]
"""Recipes that are tried with every reply."""

BARE = next(rule for rule in ALL_RULES if not rule.slots)
"""A rule without state of its own."""

KERNELS = [
    *[update_kernel(*case) for case in [*CASES, *IN_BLOCKS]],
    *[update_kernel(recipe, "float32", to) for recipe in OWN for to in PARAMETERS["reply"]],
    *[update_kernel(OWN[2].held(each), "float32", to) for each in Precision for to in PARAMETERS["reply"]],
    *[measure_kernel(recipe, gradient) for recipe, gradient in MEASURED],
    *[measure_kernel(case.recipe, case.gradient) for case in LAYERWISE_IN_BLOCKS],
    update_kernel(Recipe(BARE), "float32", "float32"),
    *[update_kernel(recipe, "float32", None) for recipe in telemetry_cases.RECIPES],
]
"""The kernels of the cases, besides those that no recipe changes; some are named twice."""

LARGE_MEASURES = 3
"""The number of cases that are measured on large arrays, which last longest."""


def slots_of(recipe: Recipe, regions: tuple[Region, ...] | None = None) -> dict[str, Holding]:
    """Return how a session holds the recipe's slots: the rule's in its precision, or by regions."""
    moments: Holding = regions or recipe.precision
    held = {slot: moments if slot in recipe.rule.slots else Precision.FLOAT32 for slot in recipe.slots}
    return {PARAM: Precision.FLOAT32, **held}


def regions_of(size: int, others: list[tuple[int, int, Precision]]) -> tuple[Region, ...]:
    """Return regions in 8 bits beside others, of which each ends where blocks may begin or padding does."""
    regions, start = [], 0
    for other in others:
        if start < other[0]:
            regions.append(Region(start, other[0], Precision.INT8))
        regions.append(Region(*other))
        start = -(-other[1] // BLOCK) * BLOCK
    return (*regions, Region(start, size, Precision.INT8)) if start < size else tuple(regions)


def step_of(recipe: Recipe, t: int = 3) -> Pass:
    """Return a pass with numbers that none of its stages leaves without effect."""
    numbers = {"factor": -0.7, "clip": 0.9, "limit": 0.1, "decay_scalar": 0.95, "average_rate": 0.1}
    idle = dict.fromkeys(("beta1", "beta2", "alpha"), 0.0) if recipe.forgotten else {}
    values = recipe.rule.scalars(NUMBERS.replace(idle), t) + ((0.3,) if recipe.rule.direction is not None else ())
    numbers |= dict(zip(recipe.rule_scalars, values, strict=True))
    return Pass(recipe, tuple(numbers[name] for name in recipe.scalars), SEED)


def make_arrays(recipe: Recipe, size: int, odd: bool) -> dict[str, np.ndarray]:
    """Make float32 arrays for a recipe's slots and the gradient; `odd` mixes in values at the edges."""
    random = np.random.default_rng(size)
    arrays = {}
    for name in (PARAM, "gradient", *recipe.slots):
        values = random.standard_normal(size) / 10.0
        if odd:
            places = random.choice(size, size // 4, replace=False)
            values[places] = random.choice(ODD, len(places))
        arrays[name] = values if name in SIGNED else np.abs(values)
    with np.errstate(all="ignore"):
        return {name: array.astype(np.float32) for name, array in arrays.items()}


def unaligned(values: np.ndarray) -> np.ndarray:
    """Copy values to an address that is a multiple of nothing, read-only like the bytes of a message."""
    result = np.empty(values.nbytes + 1, np.uint8)[1:].view(values.dtype)
    result[...] = values
    result.flags.writeable = False
    return result


def payload_of(values: np.ndarray, gradient: str) -> np.ndarray:
    """Encode float32 values as a gradient that has been received."""
    if gradient == "int8":
        blocks = np.empty(-(-len(values) // BLOCK), INT8)
        encode_blocks(values, blocks)
        return unaligned(blocks)
    with np.errstate(all="ignore"):
        return unaligned(values.astype(WIRE[gradient]))


def filled(engine: Engine, recipe: Recipe, arrays: dict[str, np.ndarray]) -> EngineState:
    """Allocate a state and write what it starts from; what is held in 8 bits is adopted."""
    state = engine.allocate(slots_of(recipe), len(arrays[PARAM]))
    in_blocks = recipe.precision is Precision.INT8
    written = engine.allocate(slots_of(recipe.in_float32), len(arrays[PARAM])) if in_blocks else state
    for slot in (PARAM, *recipe.slots):
        written.write(slot, 0, unaligned(arrays[slot]))
    if in_blocks:
        state.adopt(written)
    return state


def everything_of(state: EngineState, recipe: Recipe, size: int) -> dict[str, np.ndarray]:
    """Read all slots, and the maxima of those in 8 bits."""
    scales = [f"{slot}_scale" for slot in recipe.rule.slots if recipe.precision is Precision.INT8]
    arrays = {slot: np.empty(size, np.float32) for slot in (PARAM, *recipe.slots, *scales)}
    for slot, array in arrays.items():
        state.read(slot, 0, array).wait()
    return arrays


def sizes_of(recipe: Recipe) -> list[tuple[int, int, int, int]]:
    """Return the sizes and ranges to try a recipe with."""
    return EIGHT_BIT_SIZES if recipe.precision is Precision.INT8 else SIZES


def assert_same_bits(got: np.ndarray, want: np.ndarray, message: str = "") -> None:
    """Compare bit by bit; any NaN equals any other."""
    assert got.dtype == want.dtype and got.shape == want.shape
    bits = np.dtype(f"u{got.itemsize}")
    different = (got.view(bits) != want.view(bits)) & ~(np.isnan(got) & np.isnan(want))
    assert not different.any(), f"{message}: {got[different][:5]} instead of {want[different][:5]}"


def assert_same_numbers(got: tuple[float, ...], want: tuple[float, ...]) -> None:
    """Compare exactly, in float64; any NaN equals any other."""
    assert_same_bits(np.array(got, np.float64), np.array(want, np.float64), "sums")


def check_update(engine: Engine, reference: Engine, case: Case) -> None:
    """Compare one update, at odd sizes and offsets, from and to unaligned memory, with and without odd values."""
    recipe, gradient, reply = case
    for (size, start, begin, end), odd in itertools.product(sizes_of(recipe), (False, True)):
        arrays, results = make_arrays(recipe, size, odd), []
        payload = payload_of(arrays["gradient"], gradient)
        for each in (engine, reference):
            state = filled(each, recipe, arrays)
            dtype = WIRE[reply] if reply is not None else None
            out = None if dtype is None else np.empty((end - begin) * dtype.itemsize + 1, np.uint8)[1:].view(dtype)
            chunk = state.receive().put(0, payload, size)
            sums = state.update(step_of(recipe), start, chunk, begin, end, out).wait()
            results.append((everything_of(state, recipe, size), out, sums))
            state.close()
        (got, reply_of, sums), (want, wanted, wanted_sums) = results
        for name in want:
            assert_same_bits(got[name], want[name], f"{name} of {size}")
        if reply_of is not None:
            assert_same_bits(reply_of.copy(), wanted.copy(), f"reply of {size}")
        if not odd:
            assert sums == pytest.approx(wanted_sums, rel=1e-5)
        assert len(sums) == len(recipe.sums)


def check_measures(engine: Engine, reference: Engine, case: Case) -> None:
    """Compare the sums that layerwise rules need; measuring changes no state."""
    recipe, gradient, _ = case
    step = step_of(recipe)
    large = [(140_001, 0, 1, 140_001) if recipe.precision is Precision.INT8 else (140_001, 1, 3, 140_000)]
    sizes = sizes_of(recipe) + (large if case in LAYERWISE[:LARGE_MEASURES] else [])
    for (size, start, begin, end), odd in itertools.product(sizes, (False, True)):
        arrays, results = make_arrays(recipe, size, odd), []
        payload = payload_of(arrays["gradient"], gradient)
        for each in (engine, reference):
            state = filled(each, recipe, arrays)
            before, chunk = everything_of(state, recipe, size), state.receive().put(0, payload, size)
            sums = state.measure(step, start, chunk, begin, end).wait()
            direction = state.fetch_direction(step, start, chunk, begin, end)
            after = everything_of(state, recipe, size)
            assert all(before[name].tobytes() == after[name].tobytes() for name in before)
            results.append((sums, direction))
            state.close()
        assert_same_numbers(results[0][0], results[1][0])
        assert_same_bits(results[0][1], results[1][1], "direction")


def check_gradients(engine: Engine, reference: Engine, gradient: str) -> None:
    """Compare accumulation, and sums of squares with and without it."""
    recipe = Recipe(RULES[0], accumulates=True)
    for (size, start, begin, end), odd in itertools.product([*SIZES, (200_003, 1, 3, 200_001)], (False, True)):
        arrays, results = make_arrays(recipe, size, odd), []
        payload = payload_of(arrays["gradient"], gradient)
        for each in (engine, reference):
            state = filled(each, recipe, arrays)
            chunk = state.receive().put(0, payload, size)
            sums = [state.sum_of_squares(chunk, begin, end, -0.3, at).wait() for at in (None, start)]
            fetched = [state.fetch(chunk, begin, end, -0.3, at) for at in (None, start)]
            state.accumulate(start, chunk, begin, end, 0.7)
            results.append((tuple(sums), fetched, everything_of(state, recipe, size)))
            state.close()
        (sums, fetched, got), (wanted_sums, wanted, want) = results
        assert_same_numbers(sums, wanted_sums)
        for mine, theirs in [*zip(fetched, wanted, strict=True), *((got[name], want[name]) for name in want)]:
            assert_same_bits(mine, theirs, f"of {size}")
