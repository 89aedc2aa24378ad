"""Which tensors a step moves, and where they lie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.layout import TensorSpec, place
from stepwire_server.records.tensor_selection import Segment, TensorSelection

LAYOUT = place(
    [
        TensorSpec("a", (3,)),
        TensorSpec("b", (2,)),
        TensorSpec("c", (0,)),
        TensorSpec("d", (4,)),
        TensorSpec("e", (5,), 1),
        TensorSpec("f", (6,), 1),
    ],
    3,
)


@pytest.mark.parametrize(
    ("absent", "expected"),
    [
        ((), [(0, 9, 0), (256, 267, 1)]),
        ((0,), [(3, 9, 0), (256, 267, 1)]),
        ((1,), [(0, 3, 0), (5, 9, 0), (256, 267, 1)]),
        ((2,), [(0, 9, 0), (256, 267, 1)]),
        ((0, 1, 3), [(256, 267, 1)]),
        ((3, 4), [(0, 5, 0), (261, 267, 1)]),
        (range(6), []),
    ],
)
def test_neighbours_of_one_group_are_one_stretch(absent: tuple[int, ...], expected: list[tuple[int, ...]]) -> None:
    """An empty tensor is no boundary, and has no stretch of its own; a group's end always is."""
    assert TensorSelection(LAYOUT, frozenset(absent)).segments == tuple(Segment(*segment) for segment in expected)


@given(st.frozensets(st.integers(0, 5)))
def test_stretches_are_exactly_the_elements_of_the_tensors_that_move(absent: frozenset[int]) -> None:
    active = TensorSelection(LAYOUT, absent)
    assert set(active.indices) == set(range(6)) - absent
    elements = [element for start, end, _ in active.segments for element in range(start, end)]
    wanted = [
        element
        for index, tensor in enumerate(LAYOUT.tensors)
        if index not in absent
        for element in range(tensor.offset, tensor.end)
    ]
    assert elements == wanted
    for start, end, group in active.segments:
        assert {tensor.spec.group for tensor in LAYOUT.overlapping(start, end)} == {group}
