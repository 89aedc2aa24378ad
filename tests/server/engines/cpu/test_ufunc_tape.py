"""Stages as a tape of ufuncs: the bits of the functions themselves, with nothing allocated."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy import maximum, sqrt

from stepwire_server.engines.cpu.ufunc_tape import Tape
from stepwire_server.rules import ALL_RULES, Decay, Recipe, Stage

SIZE = 1000


def blocks(*names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(SIZE).astype(np.float32) for name in names}


def run(tape: Tape, arrays: dict[str, np.ndarray], scalars: dict[str, Any]) -> None:
    scratch = [np.full(SIZE + 9, np.nan, np.float32) for _ in range(tape.scratch_count)]
    with np.errstate(all="ignore"):
        tape.run(arrays, {name: np.float32(value) for name, value in scalars.items()}, scratch)


def swapped(a: Any, b: Any) -> Any:
    return b, a


def both(a: Any, b: Any, c: Any) -> Any:
    total = a + b
    return total * c, a - total


def bounded(a: Any, c: Any) -> Any:
    return maximum(sqrt(a * a), -c - c)


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("decay", [Decay.NONE, Decay.GRADIENT, Decay.AFTER])
def test_a_tape_gives_the_bits_of_the_functions(rule: Any, decay: Decay) -> None:
    recipe = Recipe(rule, decay, accumulates=True, limits=True, averages=True)
    state = ("p", *recipe.slots.values())
    arrays = blocks("g", *state)
    scalars = {name: np.float32(0.25 + 0.03 * index) for index, name in enumerate(recipe.scalars)}
    with np.errstate(all="ignore"):
        expected = recipe.evaluate(recipe.stages, {**arrays, **scalars})
    gradient = arrays["g"].copy()
    run(Tape(recipe.stages, ("g", *state), recipe.scalars, state), arrays, scalars)
    for name in state:
        assert arrays[name].tobytes() == expected[name].tobytes(), name
    assert arrays["g"].tobytes() == gradient.tobytes()


def test_values_that_change_places_are_not_overwritten_too_early() -> None:
    arrays = blocks("a", "b")
    before = {name: array.copy() for name, array in arrays.items()}
    run(Tape([Stage(swapped, ("a", "b"), ("a", "b"))], ("a", "b"), (), ("b",)), arrays, {})
    assert np.array_equal(arrays["b"], before["a"]) and np.array_equal(arrays["a"], before["a"])


def test_a_variable_that_is_still_needed_is_stored_at_the_end() -> None:
    arrays = blocks("a", "b")
    before = {name: array.copy() for name, array in arrays.items()}
    run(Tape([Stage(both, ("a", "b"), ("a", "b", "c"))], ("a", "b"), ("c",), ("a", "b")), arrays, {"c": 2.0})
    total = before["a"] + before["b"]
    assert np.array_equal(arrays["a"], total * np.float32(2.0))
    assert np.array_equal(arrays["b"], before["a"] - total)


def test_operations_of_scalars_stay_scalars() -> None:
    arrays = blocks("a")
    before = arrays["a"].copy()
    tape = Tape([Stage(bounded, ("a",), ("a", "c"))], ("a",), ("c",), ("a",))
    run(tape, arrays, {"c": -0.25})
    assert np.array_equal(arrays["a"], np.maximum(abs(before), np.float32(0.5)))
    assert tape.scratch_count == 1


def test_a_run_allocates_no_array() -> None:
    recipe = Recipe(ALL_RULES[0])
    state = ("p", *recipe.slots.values())
    tape = Tape(recipe.stages, ("g", *state), recipe.scalars, state)
    arrays = blocks("g", *state)
    scratch = [np.empty(SIZE, np.float32) for _ in range(tape.scratch_count)]
    scalars = {name: np.float32(0.5) for name in recipe.scalars}
    with np.errstate(all="ignore"):
        tape.run(arrays, scalars, scratch)
        tracemalloc.start()
        tape.run(arrays, scalars, scratch)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < SIZE * 4
    assert tape.scratch_count <= 3
