"""Chunks may be cut anywhere: the vector body and the scalar tail of a loop must round alike."""

from __future__ import annotations

import numpy as np
import pytest

from stepwire_server.engines import CpuEngine
from stepwire_server.rules import ALL_RULES, Precision, Recipe

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

RULE = ALL_RULES[0]
RECIPES = [Recipe(RULE), Recipe(RULE, accumulates=True, averages=True, measures=True, precision=Precision.BFLOAT16)]


@pytest.fixture(scope="module", params=["numba", "numpy"])
def engine(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    engine = CpuEngine(threads=1, use_numba=request.param == "numba")
    yield engine
    engine.close()


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=5), offset=st.integers(0, 40), data=st.data())
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_results_do_not_depend_on_where_a_range_is_split(
    engine, recipe, make_arrays, pass_of, slots_of, fill, contents, assert_same_bits, cuts, offset, data
) -> None:
    arrays = make_arrays(recipe, 340, seed=data.draw(st.integers(0, 5)), special=True)
    slots, step = slots_of(recipe), pass_of(recipe)
    whole, parts = engine.allocate(slots, 340), engine.allocate(slots, 340)
    for state in (whole, parts):
        fill(state, arrays)
    answers = [np.zeros(300, np.float32), np.zeros(300, np.float32)]
    whole.update(step, offset, whole.receive().put(0, arrays["gradient"]), 0, 300, answers[0]).wait()
    edges = [0, *sorted(cuts), 300]
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        if data.draw(st.booleans()):
            piece, at = parts.receive().put(0, arrays["gradient"][begin:end].copy()), 0
        else:
            piece, at = parts.receive().put(0, arrays["gradient"]), begin
        parts.update(step, offset + begin, piece, at, at + end - begin, answers[1][begin:end]).wait()
    assert_same_bits(answers[1], answers[0])
    got, want = contents(parts, slots, 340), contents(whole, slots, 340)
    for slot in slots:
        assert_same_bits(got[slot], want[slot], slot)
