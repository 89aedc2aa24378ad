"""Chunks may be cut anywhere: the vector body and the scalar tail of a loop must round alike."""

from __future__ import annotations

import numpy as np
import pytest

from stepwire_server.engines import PARAM, CpuEngine
from stepwire_server.rules import ALL_RULES

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

RULE = ALL_RULES[0]
SLOTS = (PARAM, *RULE.slots)


@pytest.fixture(scope="module", params=["numba", "numpy"])
def engine(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    engine = CpuEngine(threads=1, use_numba=request.param == "numba")
    yield engine
    engine.close()


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=5), offset=st.integers(0, 40), data=st.data())
def test_results_do_not_depend_on_where_a_range_is_split(
    engine, make_arrays, scalars_of, assert_same_bits, cuts, offset, data
) -> None:
    rule_arrays = make_arrays(RULE, 340, seed=data.draw(st.integers(0, 5)), special=True)
    whole, parts = engine.allocate(SLOTS, 340), engine.allocate(SLOTS, 340)
    for slot in SLOTS:
        whole.write(slot, 0, rule_arrays[slot])
        parts.write(slot, 0, rule_arrays[slot])
    scalars, answers = scalars_of(RULE), [np.zeros(300, np.float32), np.zeros(300, np.float32)]
    whole.update(RULE, scalars, offset, whole.stage(rule_arrays["gradient"]), 0, 300, answers[0])
    edges = [0, *sorted(cuts), 300]
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        piece = parts.stage(rule_arrays["gradient"][begin:end].copy())
        parts.update(RULE, scalars, offset + begin, piece, 0, end - begin, answers[1][begin:end])
    assert_same_bits(answers[1], answers[0])
    for slot in SLOTS:
        got, want = np.empty((2, 340), np.float32)
        parts.read(slot, 0, got)
        whole.read(slot, 0, want)
        assert_same_bits(got, want, slot)
