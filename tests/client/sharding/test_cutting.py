"""Where models are cut: every element once, in order, nowhere that changes what is computed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.layout import SMALLEST_IN_BLOCKS, TensorSpec, place
from stepwire.sharding.partition import GRAIN, TensorRange, cut

COUNTS = st.lists(st.integers(0, 300) | st.integers(GRAIN - 10, 5 * GRAIN), min_size=1, max_size=8)


def layout(counts: list[int], groups: list[int] | None = None):
    specs = [
        TensorSpec(f"t{index}", (count,), (groups or [0] * len(counts))[index]) for index, count in enumerate(counts)
    ]
    return place(specs, 1 + max(groups or [0]))


@given(COUNTS, st.integers(1, 6), st.booleans(), st.data())
def test_every_element_is_in_one_shard_in_order(counts, most, within_tensors, data) -> None:
    groups = data.draw(st.lists(st.integers(0, 2), min_size=len(counts), max_size=len(counts)))
    whole = layout(counts, groups)
    shards = cut(whole, most, within_tensors=within_tensors)
    assert 1 <= len(shards) <= most
    joined: list[TensorRange] = []
    for each in (each for shard in shards for each in shard):
        if joined and joined[-1].tensor == each.tensor:
            assert joined[-1].end == each.begin
            joined[-1] = TensorRange(each.tensor, joined[-1].begin, each.end)
        else:
            joined.append(each)
    assert joined == [TensorRange(index, 0, tensor.count) for index, tensor in enumerate(whole.tensors)]
    if sum(counts):
        assert all(any(each.end > each.begin for each in shard) for shard in shards)


@given(COUNTS, st.integers(1, 6))
def test_ranges_are_held_as_their_tensor_would_be(counts: list[int], most: int) -> None:
    whole = layout(counts)
    for each in (each for shard in cut(whole, most, within_tensors=True) for each in shard):
        assert each.begin % GRAIN == 0
        if each.end - each.begin < whole.tensors[each.tensor].count:
            assert each.end - each.begin >= SMALLEST_IN_BLOCKS


@given(COUNTS, st.integers(1, 6))
def test_layerwise_rules_see_whole_tensors(counts: list[int], most: int) -> None:
    whole = layout(counts)
    for each in (each for shard in cut(whole, most, within_tensors=False) for each in shard):
        assert (each.begin, each.end) == (0, whole.tensors[each.tensor].count)


@pytest.mark.parametrize("shards", [2, 3, 4, 7])
def test_shards_are_as_large_as_one_another(shards: int) -> None:
    whole = layout([50 * GRAIN + 123, 7, 31 * GRAIN, 0, 4000, 19 * GRAIN + 5000])
    sizes = [sum(each.end - each.begin for each in shard) for shard in cut(whole, shards, within_tensors=True)]
    assert len(sizes) == shards
    assert max(sizes) - min(sizes) <= 2 * GRAIN


def test_the_least_range_that_is_cut_off_has_blocks() -> None:
    assert len(cut(layout([GRAIN + SMALLEST_IN_BLOCKS - 1]), 2, within_tensors=True)) == 1
    assert cut(layout([GRAIN + SMALLEST_IN_BLOCKS]), 2, within_tensors=True) == [
        [TensorRange(0, 0, GRAIN)],
        [TensorRange(0, GRAIN, GRAIN + SMALLEST_IN_BLOCKS)],
    ]


def test_a_model_of_nothing_is_one_shard() -> None:
    assert cut(layout([0, 0]), 3, within_tensors=True) == [[TensorRange(0, 0, 0), TensorRange(1, 0, 0)]]
