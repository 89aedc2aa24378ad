"""Numba and NumPy compute the same bits, and those of the formula in float64 up to rounding.

Rules, options and codecs meet in single lines of the generated loop. So every rule alone, and every rule once more with
some of the options and some pair of codecs, leave little untried; all products would take an hour to compile.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
import pytest

from stepwire_server.engines import CpuEngine
from stepwire_server.rules import ALL_RULES, Decay, Precision, Recipe
from stepwire_server.rules.adaptive import RMSPROP_RULES
from tests.support import telemetry_cases

pytestmark = pytest.mark.many

GRADIENTS = ["float32", "bfloat16", "float16"]
REPLIES = [None, "float32", "bfloat16", "float16"]
RULES = list({rule.update: rule for rule in ALL_RULES}.values())

PLAIN = [(Recipe(rule), "float32", "float32") for rule in RULES]
PAIRS = list(itertools.product(GRADIENTS, REPLIES))
FLAGS = list(itertools.product([True, False], repeat=4))
PLACES = [decay for decay in Decay if decay is not Decay.NONE]
MIXED = [
    (
        Recipe(
            rule,
            Decay.NONE if rule.direction else PLACES[index % 5],
            *FLAGS[index * 3 % 16],
            Precision.BFLOAT16 if index % 5 in (0, 1, 3) else Precision.FLOAT32,
        ),
        *PAIRS[index % 12],
    )
    for index, rule in enumerate(RULES)
]


FORGETFUL = [
    (Recipe(rule, Decay.WITHIN, forgotten=tuple(slot for slot, _ in rule.means)), "float32", "float32")
    for rule in (RULES[0], RMSPROP_RULES[True, True])
]


def kernel_id(value: Any) -> str:
    return value.name if isinstance(value, Recipe) else str(value)


@pytest.fixture(scope="module")
def numba_engine():
    pytest.importorskip("numba")
    engine = CpuEngine(threads=1, use_numba=True)
    yield engine
    engine.close()


def test_the_cases_use_every_option_and_every_pair_of_codecs() -> None:
    recipes = [recipe for recipe, _, _ in MIXED]
    assert {(gradient, reply) for _, gradient, reply in MIXED} == set(PAIRS)
    assert {recipe.decay for recipe in recipes} == set(Decay)
    for flag in ("accumulates", "limits", "averages", "measures"):
        for precision in (Precision.FLOAT32, Precision.BFLOAT16):
            assert {getattr(recipe, flag) for recipe in recipes if recipe.precision is precision} == {False, True}
    assert {recipe.sums for recipe in recipes} == {(), ("update", "param"), ("update", "param", "gradient")}


COMPILED = MIXED + FORGETFUL + (PLAIN if os.environ.get("CI") == "true" else [])
"""Every rule with options; in CI without any, too."""


@pytest.mark.parametrize(("recipe", "gradient", "reply"), COMPILED, ids=kernel_id)
def test_numba_is_numpy_bit_for_bit(recipe, gradient, reply, wire, numba_engine, check_same) -> None:
    check_same(numba_engine, recipe, wire[gradient], wire.get(reply))


@pytest.mark.parametrize(("recipe", "gradient", "reply"), PLAIN + MIXED + FORGETFUL, ids=kernel_id)
def test_numpy_is_the_recipe_up_to_rounding(
    recipe, gradient, reply, wire, numpy_engine, run_step, make_arrays, pass_of, assert_same_bits
) -> None:
    """With the test above, this holds for Numba as well."""
    arrays, step = make_arrays(recipe, 1037, seed=5), pass_of(recipe)
    got, _ = run_step(numpy_engine, step, arrays, wire[gradient], wire.get(reply), 2, 1, 1036)
    names = {"param": "p", **recipe.slots}
    held = {slot: arrays[slot][2:] for slot in names}
    if recipe.precision is Precision.BFLOAT16:
        held |= {slot: held[slot].astype(wire["bfloat16"]) for slot in recipe.rule.slots}
    values = {variable: held[slot].astype(np.float64) for slot, variable in names.items()}
    values["g"] = arrays["gradient"].astype(wire[gradient]).astype(np.float64)[1:1036]
    exact = recipe.evaluate(recipe.stages, values | dict(zip(recipe.scalars, step.scalars, strict=True)))
    for slot, variable in names.items():
        expected = np.zeros(1035) if slot == "grad_accumulation" else exact[variable]
        rounds = recipe.precision is Precision.BFLOAT16 and slot in recipe.rule.slots
        np.testing.assert_allclose(got[slot][2:], expected, rtol=2.0**-7 if rounds else 1e-5, atol=1e-6, err_msg=slot)
        before = held[slot].dtype
        assert_same_bits(got[slot][:2], arrays[slot][:2].astype(before).astype(np.float32), "outside the range")
    if reply is not None:
        assert_same_bits(got["out"], got["param"][2:].astype(wire[reply]), "the answer")


MEASURING = [case for case in MIXED if case[0].measures]


@pytest.mark.parametrize("engine_name", ["numba", "numpy"])
@pytest.mark.parametrize(("recipe", "gradient", "reply"), MEASURING, ids=kernel_id)
def test_measured_sums_are_right(
    recipe, gradient, reply, engine_name, wire, request, run_step, make_arrays, pass_of
) -> None:
    engine = request.getfixturevalue(f"{engine_name}_engine")
    arrays, step = make_arrays(recipe, 20_011, seed=5), pass_of(recipe)
    got, sums = run_step(engine, step, arrays, wire[gradient], wire.get(reply), 2, 1, 20_010)
    squared = {
        "update": got["param"].astype(np.float64)[2:] - arrays["param"][2:],
        "param": got["param"].astype(np.float64)[2:],
    }
    names = {slot: variable for slot, variable in recipe.slots.items() if slot not in recipe.rule.slots}
    values: dict[str, Any] = {variable: arrays[slot][2:] for slot, variable in names.items()}
    values |= {"p": arrays["param"][2:], "g": arrays["gradient"].astype(wire[gradient]).astype(np.float32)[1:20_010]}
    numbers = dict(zip(recipe.scalars, map(np.float32, step.scalars), strict=True))
    squared["gradient"] = recipe.evaluate(recipe.treatment, values | numbers)["g"].astype(np.float64)
    assert len(sums) == len(recipe.sums)
    for name, value in zip(recipe.sums, sums, strict=True):
        assert value == pytest.approx(float(np.sum(squared[name] ** 2)), rel=1e-5), name


@pytest.mark.parametrize("engine_name", ["numba", "numpy"])
@pytest.mark.parametrize("recipe", telemetry_cases.RECIPES, ids=kernel_id)
def test_measured_sums_are_right_over_all_of_float32s_range(recipe, engine_name, request) -> None:
    telemetry_cases.check_range(request.getfixturevalue(f"{engine_name}_engine"), recipe)


@pytest.mark.parametrize("engine_name", ["numba", "numpy"])
def test_sums_of_what_is_not_finite_are_not_finite(engine_name, request, wire, run_step, make_arrays, pass_of) -> None:
    engine = request.getfixturevalue(f"{engine_name}_engine")
    recipe, gradient, reply = MEASURING[0]
    for odd in (np.nan, np.inf):
        arrays = make_arrays(recipe, 300)
        arrays["param"][100] = odd
        _, sums = run_step(engine, pass_of(recipe), arrays, wire[gradient], wire.get(reply), 0, 0, 300)
        assert not np.isfinite(sums[1])


# --- stochastic rounding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine_name", ["numba", "numpy"])
def test_the_seed_decides_how_slots_are_rounded(
    engine_name, request, wire, run_step, make_arrays, pass_of, assert_same_bits
) -> None:
    engine = request.getfixturevalue(f"{engine_name}_engine")
    recipe, gradient, reply = next(case for case in MIXED if case[0].precision is Precision.BFLOAT16)
    arrays = make_arrays(recipe, 5000)
    results = [
        run_step(engine, pass_of(recipe, seed=seed), arrays, wire[gradient], wire.get(reply), 0, 0, 5000)[0]
        for seed in (1, 1, 2, 2**32 - 1)
    ]
    for slot in results[0]:
        assert_same_bits(results[0][slot], results[1][slot])
    slot = recipe.rule.slots[0]
    for one, two in ((0, 2), (0, 3), (2, 3)):
        assert (results[one][slot] != results[two][slot]).any()
    assert_same_bits(results[0]["param"], results[2]["param"], "the parameters are computed before")


# --- sums of squares ------------------------------------------------------------------------------------------


RANGES = [(0, 0), (0, 1), (3, 1003), (1, 65_537), (0, 131_072), (5, 200_003)]


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("name", GRADIENTS)
def test_sums_of_squares_are_the_same_bits_everywhere(
    name, accumulates, wire, unaligned, numba_engine, numpy_engine
) -> None:
    random = np.random.default_rng(2)
    values, sums_before = random.standard_normal((2, 200_003)).astype(np.float32)
    values = values.astype(wire[name])
    states = [
        engine.allocate({"param": Precision.FLOAT32, "grad_accumulation": Precision.FLOAT32}, 200_010)
        for engine in (numpy_engine, numba_engine)
    ]
    for state in states:
        state.write("grad_accumulation", 7, sums_before)
    staged = [state.receive().put(0, unaligned(values)) for state in states]
    for begin, end in RANGES:
        at = 7 + begin if accumulates else None
        fetched = [state.fetch(chunk, begin, end, 0.3, at) for state, chunk in zip(states, staged, strict=True)]
        squared = values[begin:end].astype(np.float32) * np.float32(0.3)
        squared = sums_before[begin:end] + squared if accumulates else squared
        assert all((one == squared).all() and one.dtype == np.float32 for one in fetched)
        one, two = (
            state.sum_of_squares(chunk, begin, end, 0.3, at).wait() for state, chunk in zip(states, staged, strict=True)
        )
        assert one == two


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.direction], ids=lambda rule: rule.name)
def test_measured_norms_are_the_same_bits_everywhere(
    rule, unaligned, numba_engine, numpy_engine, make_arrays, pass_of, slots_of, fill
) -> None:
    recipe = Recipe(rule)
    arrays, step = make_arrays(recipe, 70_009), pass_of(recipe)
    results = []
    for engine in (numpy_engine, numba_engine):
        state = engine.allocate(slots_of(recipe), 70_009)
        fill(state, arrays)
        chunk = state.receive().put(0, unaligned(arrays["gradient"]))
        directions = state.fetch_direction(step, 2, chunk, 1, 70_008)
        results.append((state.measure(step, 2, chunk, 1, 70_008).wait(), directions))
        exact = [float(np.sum(values.astype(np.float64) ** 2)) for values in (arrays["param"][2:], directions)]
        assert results[-1][0] == pytest.approx(exact, rel=1e-12)
        assert state.measure(step, 2, chunk, 1, 1).wait() == (0.0, 0.0)
    assert results[0][0] == results[1][0]
    assert (results[0][1] == results[1][1]).all()


@pytest.mark.parametrize("name", GRADIENTS)
def test_accumulated_sums_are_the_same_bits_everywhere(
    name, wire, unaligned, numba_engine, numpy_engine, assert_same_bits
) -> None:
    random = np.random.default_rng(3)
    with np.errstate(all="ignore"):
        chunks = (random.standard_normal((3, 40_001)) * [[1.0], [1e-3], [1e6]]).astype(wire[name])
    chunks[0, ::7] = np.nan
    chunks[0, ::5] = np.inf
    results = []
    for engine in (numpy_engine, numba_engine):
        state = engine.allocate({"grad_accumulation": Precision.FLOAT32}, 40_010)
        for chunk in chunks:
            state.accumulate(4, state.receive().put(0, unaligned(chunk)), 1, 40_001, 0.3)
        results.append(np.empty(40_010, np.float32))
        state.read("grad_accumulation", 0, results[-1]).wait()
    expected = np.zeros(40_000, np.float32)
    with np.errstate(all="ignore"):
        for chunk in chunks:
            expected = chunk[1:].astype(np.float32) * np.float32(0.3) + expected
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0][4:-6], expected)
    assert not results[0][:4].any() and not results[0][-6:].any()


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", GRADIENTS)
def test_sums_are_finite_exactly_if_every_element_is(name, odd, wire, numba_engine, numpy_engine) -> None:
    largest = np.finfo(np.float32).max if name == "float32" else 60_000.0
    values = np.full(70_001, largest, wire[name])
    for engine in (numba_engine, numpy_engine):
        state = engine.allocate({"param": Precision.FLOAT32}, 70_001)
        assert np.isfinite(state.sum_of_squares(state.receive().put(0, values), 0, len(values), 1.0).wait())
        for place in (0, 33, 65_535, 65_536, 70_000):
            broken = values.copy()
            broken[place] = odd
            assert not np.isfinite(state.sum_of_squares(state.receive().put(0, broken), 0, len(values), 1.0).wait())
