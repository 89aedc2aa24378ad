"""The ways of elements from one partition to another one, against a copy of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stepwire
from stepwire.layout import Layout, TensorSpec, place
from stepwire.sharding.moved_numbers import moved_numbers
from stepwire.sharding.partition import Partition
from stepwire.sharding.redistribution import Redistribution
from stepwire.v1 import move_pb2, optimizer_pb2, step_pb2

GRAIN = 65_536


def spaces(partition: Partition) -> list[Layout]:
    return [place(partition.specs(rank), len(partition.layout.groups)) for rank in range(len(partition.shards))]


def laid_out(partition: Partition, layouts: Sequence[Layout], whole: list[Any]) -> list[Any]:
    """Return the flat space of each shard, with -1 for padding."""
    found = []
    for ranges, layout in zip(partition.shards, layouts, strict=True):
        flat = np.full(layout.size, -1, np.float32)
        for each, tensor in zip(ranges.ranges, layout.tensors, strict=True):
            flat[tensor.offset : tensor.end] = whole[each.tensor][each.begin : each.end]
        found.append(flat)
    return found


counts = st.lists(st.sampled_from([0, 1, 7, 300, 4096, 70_000, 200_000]), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(counts, st.integers(1, 5), st.integers(1, 5), st.sampled_from([1000, 65_536, 1 << 20]), st.booleans())
def test_every_element_comes_to_its_place_once(
    counts: list[int], former: int, new: int, block: int, in_8_bits: bool
) -> None:
    precision = "int8" if in_8_bits else "float32"
    specs = [TensorSpec(f"t{i}", (n,), group=i % 2, state_precision=precision) for i, n in enumerate(counts)]
    layout = place(specs, 2)
    numbers = itertools.count()
    whole = [np.arange(tensor.count, dtype=np.float32) + 1000 * next(numbers) for tensor in layout.tensors]
    before, after = (Partition.make(layout, most, within_tensors=True) for most in (former, new))
    sources, targets = spaces(before), spaces(after)
    ways = Redistribution(before, sources, after, targets)
    found = [np.full(each.size, -1, np.float32) for each in targets]
    for rank, flat in enumerate(laid_out(before, sources, whole)):
        for start in range(0, len(flat), block):
            for moved in ways.split(rank, "param", start, flat[start : start + block]):
                place_of_block = found[moved.shard][moved.start : moved.start + len(moved.values)]
                assert moved.slot == "param" and (place_of_block == -1).all()
                place_of_block[:] = moved.values
    for flat, expected in zip(found, laid_out(after, targets, whole), strict=True):
        assert flat.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("meaning", "halves"), [("row_counter", 2), ("row_wise", 1)])
def test_the_numbers_of_rows_go_with_their_rows(meaning: str, halves: int) -> None:
    layout = place([TensorSpec("w", (5,)), TensorSpec("rows", (20_000, 16), table=meaning)], 1)
    before, after = (Partition.make(layout, most, within_tensors=True) for most in (2, 3))
    sources, targets = spaces(before), spaces(after)
    ways = Redistribution(before, sources, after, targets)

    def numbers(partition: Partition, layouts: Sequence[Layout]) -> dict[tuple[int, str], Any]:
        kept = {}
        for rank, (ranges, own) in enumerate(zip(partition.shards, layouts, strict=True)):
            for index in own.tables:
                rows = np.arange(ranges.ranges[index].begin // 16, ranges.ranges[index].end // 16, dtype=np.float32)
                kept[rank, f"row_numbers.{index}"] = np.concatenate([rows + 50_000 * half for half in range(halves)])
        return kept

    expected = numbers(after, targets)
    found = {name: np.full(len(values), -1, np.float32) for name, values in expected.items()}
    for (rank, slot), values in numbers(before, sources).items():
        for start in range(0, len(values), 777):
            for moved in ways.split(rank, slot, start, values[start : start + 777]):
                found[moved.shard, moved.slot][moved.start : moved.start + len(moved.values)] = moved.values
    assert {name: values.tolist() for name, values in found.items()} == {
        name: values.tolist() for name, values in expected.items()
    }


def parts(*steps: int) -> tuple[Partition, Partition, list[move_pb2.StateNumbers]]:
    layout = place([TensorSpec("a", (4,)), TensorSpec("w", (4 * GRAIN,))], 1)
    before, after = (Partition.make(layout, most, within_tensors=True) for most in (2, 4))
    found = []
    for ranges, step in zip(before.shards, steps, strict=True):
        telemetry = step_pb2.Telemetry(grad_norm=3.0 + len(found), clipped_grad_norm=0.6, non_finite_count=1)
        telemetry.groups.add(grad_norm=3.0 + len(found), t=step, hyperparameters=optimizer_pb2.Hyperparameters(lr=0.1))
        result = step_pb2.StepResult(step=step, epoch=1, telemetry=telemetry)
        counted = [step + 10 * each.tensor for each in ranges.ranges]
        found.append(
            move_pb2.StateNumbers(
                step=step, load=2, tensor_steps=counted, sum_bound=float(len(found)), last_result=result
            )
        )
    return before, after, found


def test_each_range_has_the_numbers_of_its_tensor_and_the_first_shard_the_result() -> None:
    before, after, numbers = parts(5, 5)
    moved = moved_numbers(before, numbers, after)
    assert [list(each.tensor_steps) for each in moved] == [
        [5 + 10 * own.tensor for own in ranges.ranges] for ranges in after.shards
    ]
    assert {(each.step, each.load, each.sum_bound) for each in moved} == {(5, 2, 1.0)}
    assert [each.last_result.telemetry.grad_norm for each in moved] == [5.0, 0.0, 0.0, 0.0]
    assert [each.last_result.telemetry.non_finite_count for each in moved] == [2, 0, 0, 0]
    assert {each.last_result.telemetry.groups[0].t for each in moved} == {5}
    assert {each.last_result.telemetry.groups[0].hyperparameters.lr for each in moved} == {0.1}


def test_shards_that_are_not_at_one_moment_are_refused() -> None:
    before, after, numbers = parts(5, 6)
    with pytest.raises(stepwire.StepMismatchError, match=r"differ in their step: \[5, 6\]"):
        moved_numbers(before, numbers, after)
    before, after, numbers = parts(5, 5)
    numbers[1].tensor_steps[-1] = 7
    with pytest.raises(stepwire.StepMismatchError, match=r"ranges of tensor 'w' have the t 15 and 7"):
        moved_numbers(before, numbers, after)
