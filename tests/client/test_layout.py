"""The flat address space: where tensors lie, and which of them a range touches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.layout import GROUP_ALIGNMENT, Placement, Range, TensorSpec, place

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def spec_lists(draw: st.DrawFn) -> tuple[list[TensorSpec], int]:
    """Tensors of up to four groups, empty groups and empty tensors included."""
    groups = draw(st.integers(1, 4))
    members = draw(st.lists(st.tuples(SHAPES, st.integers(0, groups - 1)), max_size=12))
    return [TensorSpec(f"t{index}", shape, group) for index, (shape, group) in enumerate(members)], groups


def test_a_scalar_is_one_element() -> None:
    assert TensorSpec("s", ()).count == 1
    assert TensorSpec("e", (3, 0, 2)).count == 0


def test_groups_lie_in_index_order_from_aligned_starts() -> None:
    specs = [TensorSpec("b", (3,), 1), TensorSpec("a", (2, 2), 0), TensorSpec("c", (), 1), TensorSpec("d", (5,), 0)]
    layout = place(specs, 3)
    assert [(tensor.spec.name, tensor.offset, tensor.end) for tensor in layout.tensors] == [
        ("a", 0, 4),
        ("d", 4, 9),
        ("b", 256, 259),
        ("c", 259, 260),
    ]
    assert layout.groups == (Range(0, 9), Range(256, 4), Range(512, 0))
    assert layout.size == 512
    assert layout.tensor_indices() == {"a": 0, "d": 1, "b": 2, "c": 3}


def test_a_full_group_needs_no_padding() -> None:
    layout = place([TensorSpec("a", (256,), 0), TensorSpec("b", (1,), 1)], 2)
    assert layout.groups == (Range(0, 256), Range(256, 1))
    assert layout.size == 257


@given(spec_lists())
def test_every_element_has_one_place(built: tuple[list[TensorSpec], int]) -> None:
    specs, group_count = built
    layout = place(specs, group_count)
    taken = [position for tensor in layout.tensors for position in range(tensor.offset, tensor.end)]
    assert len(taken) == len(set(taken)) == sum(spec.count for spec in specs)
    assert all(position < layout.size for position in taken)
    assert all(group.offset % GROUP_ALIGNMENT == 0 for group in layout.groups)
    for tensor in layout.tensors:
        group = layout.groups[tensor.spec.group]
        assert group.offset <= tensor.offset <= tensor.end <= group.end
    assert {tensor.spec for tensor in layout.tensors} == set(specs)


@given(spec_lists(), st.integers(0, 1100), st.integers(1, 1100))
def test_overlapping_finds_what_a_search_of_all_finds(
    built: tuple[list[TensorSpec], int], start: int, length: int
) -> None:
    layout = place(*built)
    end = start + length

    def touches(tensor: Placement) -> bool:
        return max(tensor.offset, start) < min(tensor.end, end)

    assert list(layout.overlapping(start, end)) == [tensor for tensor in layout.tensors if touches(tensor)]


def test_placing_looks_at_each_tensor_once_however_many_groups() -> None:
    """A request may name 65,536 tensors and 1,024 groups; work for each pair would block a handler for many seconds."""
    looks = 0

    class Watched(list[TensorSpec]):
        def __iter__(self) -> Iterator[TensorSpec]:
            nonlocal looks
            looks += 1
            return super().__iter__()

    layout = place(Watched(TensorSpec(str(index), (1,), index % 100) for index in range(300)), 100)
    assert layout.size == 99 * GROUP_ALIGNMENT + 3
    assert looks == 1


def test_large_tensors_in_blocks_start_where_blocks_do() -> None:
    """Small ones lie wherever there is room: they have no blocks."""
    counts = {"a": 10, "b": 4096, "c": 4095, "d": 5000, "e": 1}
    layout = place([TensorSpec(name, (count,), state_precision="int8") for name, count in counts.items()], 1)
    assert [(tensor.spec.name, tensor.offset, tensor.count) for tensor in layout.tensors] == [
        ("a", 0, 10),
        ("b", 256, 4096),
        ("c", 4352, 4095),
        ("d", 8448, 5000),
        ("e", 13448, 1),
    ]
    assert (layout.size, layout.groups, layout.chunk_alignment) == (13449, (Range(0, 13449),), 256)


def test_tensors_in_other_precisions_lie_between_blocks_wherever_there_is_room() -> None:
    precisions = ["float32", "int8", "bfloat16", "float32", "int8"]
    layout = place([TensorSpec(f"t{i}", (5000,), 0, False, each) for i, each in enumerate(precisions)], 1)
    assert [tensor.offset for tensor in layout.tensors] == [0, 5120, 10120, 15120, 20224]
    assert layout.chunk_alignment == 256


@pytest.mark.parametrize(
    ("precision", "count", "held"),
    [("float32", 5000, "float32"), ("bfloat16", 1, "bfloat16"), ("int8", 4095, "float32"), ("int8", 4096, "int8")],
)
def test_a_tensor_too_small_for_blocks_keeps_float32(precision: str, count: int, held: str) -> None:
    assert TensorSpec("w", (count,), state_precision=precision).held_precision == held


def test_without_blocks_chunks_may_start_anywhere() -> None:
    layout = place([TensorSpec("a", (10,)), TensorSpec("b", (5000,))], 1)
    assert (layout.tensors[1].offset, layout.chunk_alignment) == (10, 1)
