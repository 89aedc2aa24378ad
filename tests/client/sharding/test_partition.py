"""A cut model, and the same read again from its shards alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.errors import InvalidRequestError
from stepwire.layout import Layout, TensorSpec, place
from stepwire.sharding.partition import GRAIN, Partition

SPECS = st.lists(
    st.tuples(
        st.integers(0, 300) | st.integers(GRAIN, 3 * GRAIN),
        st.integers(0, 2),
        st.booleans(),
        st.sampled_from(["float32", "bfloat16", "int8"]),
    ),
    min_size=1,
    max_size=7,
)


def of(specs: list[TensorSpec], most: int) -> Partition:
    return Partition.make(place(specs, 3), most, within_tensors=True)


def layouts(partition: Partition) -> list[Layout]:
    return [place(partition.specs(shard), 3) for shard in range(len(partition.shards))]


@given(SPECS, st.integers(1, 5))
def test_a_partition_is_read_again_from_its_shards(drawn, most: int) -> None:
    specs = [TensorSpec(f"t{i}", (count,), *rest) for i, (count, *rest) in enumerate(drawn)]
    made = of(specs, most)
    assert Partition.read(layouts(made)) == made


@given(SPECS, st.integers(2, 5))
def test_a_range_is_held_as_its_tensor_is(drawn, most: int) -> None:
    """So a tensor in blocks has the blocks that it has in the whole, and none of its ranges is too small for them."""
    specs = [TensorSpec(f"t{i}", (count,), *rest) for i, (count, *rest) in enumerate(drawn)]
    made = of(specs, most)
    for ranges, layout in zip(made.shards, layouts(made), strict=True):
        for each, tensor in zip(ranges.ranges, layout.tensors, strict=True):
            whole = made.layout.tensors[each.tensor].spec
            assert (tensor.spec.state_precision, tensor.spec.held_precision) == (
                whole.state_precision,
                whole.held_precision,
            )


@given(SPECS, st.integers(1, 5))
def test_ranges_are_views_that_make_up_the_whole(drawn, most: int) -> None:
    specs = [TensorSpec(f"t{i}", (count,), group) for i, (count, group, *_) in enumerate(drawn)]
    made = of(specs, most)
    flat = [np.arange(tensor.count) for tensor in made.layout.tensors]
    for ranges, layout in zip(made.shards, layouts(made), strict=True):
        parts = ranges.of(flat)
        assert [len(part) for part in parts] == [tensor.count for tensor in layout.tensors]
        for part in parts:
            part[:] = -1
    assert all((values == -1).all() for values in flat)


def test_a_shard_finds_the_tensors_it_has_some_of() -> None:
    made = of([TensorSpec("a", (2 * GRAIN,)), TensorSpec("b", (5,)), TensorSpec("c", (2 * GRAIN,))], 2)
    first, second = made.shards
    assert [each.tensor for each in first.ranges] == [0]
    assert (first.indices([2, 0, 1]), second.indices([2, 0, 1])) == ([0], [1, 0])
    assert first.of([np.empty(0)] * 3)[0].size == 0


THREE = of([TensorSpec("a", (3 * GRAIN,)), TensorSpec("b", (GRAIN,), 1)], 3)


def other_group(layout: Layout) -> Layout:
    return place([dataclasses.replace(tensor.spec, group=2) for tensor in layout.tensors], 3)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda all: all[:1], "there are .* of 196608 elements"),
        (lambda all: [all[1], all[0], all[2]], "'a' is in ranges that do not follow"),
        (lambda all: [all[0], all[0], all[1], all[2]], "'a' is in ranges that do not follow"),
        (lambda all: [other_group(all[0]), *all[1:]], "'a' is in ranges that do not follow"),
        (lambda all: [all[0], place([TensorSpec("c", (4,))], 1)], "different numbers of parameter groups"),
    ],
)
def test_what_is_no_model_is_told(spoil, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"not the shards of one model: .*{problem}") as refused:
        Partition.read(spoil(layouts(THREE)))
    assert refused.value.metadata["field"] == "session_id"
