"""Chunks on their way in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import TensorSpec, place
from stepwire.optimizers.norms import RELATIVE_ERROR
from stepwire.wire.dtypes import FLOAT32
from stepwire.wire.int8_blocks import BLOCK, INT8, decode_blocks, encode_blocks
from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines import CpuEngine
from stepwire_server.records.tensor_selection import TensorSelection
from stepwire_server.rules import Precision
from stepwire_server.steps.coverage import Coverage, typed_payload
from stepwire_server.steps.gradient import StagedGradient

LAYOUT = place([TensorSpec("a", (3, 5)), TensorSpec("b", (4,)), TensorSpec("c", (9,), 1)], 2)
SIZE = 265
ALL = TensorSelection(LAYOUT, frozenset())
SLOTS = {"param": Precision.FLOAT32}


@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=30))
def test_coverage_is_a_set_of_elements(size: int, chunks: list[tuple[int, int]]) -> None:
    """Held against an actual set: a chunk counts if non-empty, inside and disjoint; nothing missing is complete."""
    coverage, seen, offsets = Coverage(size), set[int](), []
    for offset, count in chunks:
        elements = set(range(offset, offset + count))
        if elements and offset + count <= size and not elements & seen:
            offsets.append(offset)
            assert coverage.add(offset, count) == sorted(offsets).index(offset)
            seen |= elements
        else:
            with pytest.raises(InvalidRequestError) as refused:
                coverage.add(offset, count)
            assert refused.value.reason is Reason.INVALID_TENSOR
            assert refused.value.metadata == {
                "field": "chunk",
                "offset": str(offset),
                "end": str(offset + count),
            }
    missing = sorted(set(range(size)) - seen)
    if not missing:
        coverage.require([(0, size)])
        return
    with pytest.raises(InvalidRequestError) as refused:
        coverage.require([(0, size)])
    assert refused.value.metadata["missing_offset"] == str(missing[0])
    end = next((element for element in range(missing[0], size) if element in seen), size)
    assert refused.value.metadata["missing_end"] == str(end)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=8),
    st.lists(st.integers(0, 30), unique=True, max_size=8),
)
def test_only_what_is_needed_must_have_come(chunks: list[tuple[int, int]], edges: list[int]) -> None:
    """The first needed element that is missing is named, and how far the gap goes within its range."""
    coverage, seen = Coverage(30), set[int]()
    for offset, count in chunks:
        elements = set(range(offset, offset + count))
        if offset + count <= 30 and not elements & seen:
            coverage.add(offset, count)
            seen |= elements
    edges = sorted(edges)
    needed = list(zip(edges[::2], edges[1::2], strict=False))
    gaps = [(at, end) for start, end in needed for at in range(start, end) if at not in seen]
    if not gaps:
        coverage.require(needed)
        return
    with pytest.raises(InvalidRequestError) as refused:
        coverage.require(needed)
    first, limit = gaps[0]
    end = next((element for element in range(first, limit) if element in seen), limit)
    assert refused.value.reason is Reason.INVALID_TENSOR
    assert refused.value.metadata == {"field": "chunk", "missing_offset": str(first), "missing_end": str(end)}


@pytest.mark.parametrize(("size", "most"), [(2000, 1024), (16_384 * 3, 1027)])
def test_the_number_of_chunks_is_bounded(size: int, most: int) -> None:
    coverage = Coverage(size)
    for offset in range(most):
        coverage.add(offset, 1)
    with pytest.raises(InvalidRequestError, match=f"is one more than the {most} allowed; send larger chunks"):
        coverage.add(most, 1)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_payload_is_viewed_as_its_elements(dtype: Any) -> None:
    values = np.array([1.5, -2.0, 0.25], dtype)
    payload = np.frombuffer(b"x" + values.tobytes(), np.uint8)[1:]
    typed = typed_payload(payload, 3, np.dtype(dtype))
    assert typed.tobytes() == values.tobytes()
    assert np.shares_memory(typed, payload)


@pytest.mark.parametrize(("nbytes", "count"), [(11, 3), (12, 2), (12, 4), (0, 1), (12, 2**62 + 3), (4, 0)])
def test_a_payload_of_another_size_is_refused(nbytes: int, count: int) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        typed_payload(np.zeros(nbytes, np.uint8), count, np.dtype(np.float32))
    assert refused.value.metadata == {
        "field": "chunk.count",
        "count": str(count),
        "payload_bytes": str(nbytes),
    }


@pytest.fixture
def stage() -> Callable[..., StagedGradient]:
    """Await a gradient that has reserved 1,000 of 5,000 bytes: `stage.budget`."""
    engine, budget = CpuEngine(threads=1, use_numba=False), MemoryBudget(5000)
    state = engine.allocate(SLOTS, SIZE)

    def make(
        selection: TensorSelection = ALL, *, dtype: Any = np.float32, unscale: float = 1.0, sums: bool = True
    ) -> StagedGradient:
        room = budget.reserve(1000, "it")
        return StagedGradient(np.dtype(dtype), selection, state, room, unscale=unscale, sums=sums)

    make.budget = budget  # type: ignore[attr-defined]
    return make


def add(gradient: StagedGradient, values: Any, ranges: list[tuple[int, int]]) -> None:
    for start, end in ranges:
        gradient.add(start, end - start, np.frombuffer(values[start:end].tobytes(), np.uint8))


@given(st.lists(st.integers(1, SIZE - 1), unique=True, max_size=6), st.randoms(use_true_random=False))
def test_norms_do_not_depend_on_how_a_gradient_arrives(cuts: list[int], random: Any) -> None:
    """Bit for bit the same for any order of the same chunks; each group's own, padding left out."""
    values = np.random.default_rng(5).standard_normal(SIZE).astype(np.float32)
    edges = [0, *sorted(cuts), SIZE]
    ranges = list(zip(edges, edges[1:], strict=False))
    engine, budget = CpuEngine(threads=1, use_numba=False), MemoryBudget(5000)
    norms = []
    for _ in range(2):
        state, room = engine.allocate(SLOTS, SIZE), budget.reserve(1, "it")
        gradient = StagedGradient(FLOAT32, ALL, state, room, unscale=1.0)
        add(gradient, values, ranges)
        gradient.complete()
        gradient.settle()
        norms.append(gradient.squared_norms())
        random.shuffle(ranges)
    assert norms[0] == norms[1]
    wanted = [(values[:19].astype(np.float64) ** 2).sum(), (values[256:].astype(np.float64) ** 2).sum()]
    assert norms[0] == pytest.approx(wanted, rel=1e-12)


def test_chunks_come_out_in_flat_order(stage: Any) -> None:
    gradient, values = stage(), np.arange(SIZE, dtype=np.float32)
    add(gradient, values, [(200, SIZE), (0, 7), (7, 200)])
    drained = list(gradient.drain([(0, SIZE)]))
    assert [(start, end, chunk.offset, chunk.end, len(chunk.gradient)) for start, end, chunk in drained] == [
        (0, 7, 0, 7, 7),
        (7, 200, 7, 200, 193),
        (200, SIZE, 200, SIZE, 65),
    ]
    assert list(gradient.drain([(0, SIZE)])) == [(0, SIZE, None)]


def test_what_nobody_sent_comes_out_as_nothing(stage: Any) -> None:
    """So that an answer covers the whole space."""
    gradient = stage()
    add(gradient, np.arange(SIZE, dtype=np.float32), [(256, SIZE - 1), (3, 19)])
    drained = [(start, end, chunk and (chunk.offset, chunk.end)) for start, end, chunk in gradient.drain([(0, SIZE)])]
    assert drained == [
        (0, 3, None),
        (3, 19, (3, 19)),
        (19, 256, None),
        (256, SIZE - 1, (256, SIZE - 1)),
        (SIZE - 1, SIZE, None),
    ]


def test_padding_and_tensors_that_do_not_move_need_not_come(stage: Any) -> None:
    values = np.ones(SIZE, np.float32)
    gradient = stage()
    add(gradient, values, [(0, 19), (256, SIZE)])
    gradient.complete()
    partial = stage(TensorSelection(LAYOUT, frozenset({1})))
    add(partial, values, [(0, 15)])
    with pytest.raises(InvalidRequestError, match=r"elements \[256, 265\) were not sent"):
        partial.complete()
    add(partial, values, [(256, SIZE)])
    partial.complete()
    assert partial.squared_norms() == [15.0, 9.0]


def test_what_comes_for_a_tensor_that_does_not_move_is_ignored(stage: Any) -> None:
    """NaN too."""
    values = np.ones(SIZE, np.float32)
    values[15:19] = np.nan
    gradient = stage(TensorSelection(LAYOUT, frozenset({1})))
    add(gradient, values, [(0, SIZE)])
    gradient.complete()
    gradient.settle()
    assert (gradient.squared_norms(), gradient.non_finite_count) == ([15.0, 9.0], 0)


@pytest.mark.parametrize("unscale", [1.0, 1.0 / 3.0, 2.0**-16, 2.0**20])
def test_norms_are_of_the_unscaled_float32_elements(stage: Any, unscale: float) -> None:
    values = np.random.default_rng(3).standard_normal(SIZE).astype(np.float32)
    gradient = stage(unscale=unscale)
    add(gradient, values, [(0, 100), (100, SIZE)])
    unscaled = (values * np.float32(unscale)).astype(np.float64) ** 2
    wanted = [math.fsum(unscaled[:19]), math.fsum(unscaled[256:])]
    gradient.settle()
    assert gradient.squared_norms() == pytest.approx(wanted, rel=RELATIVE_ERROR)
    assert [float(gradient.exact_squared_norm([group])) for group in (0, 1)] == pytest.approx(wanted, rel=1e-15)
    assert gradient.exact_squared_norm([0, 1]) == gradient.exact_squared_norm([0]) + gradient.exact_squared_norm([1])


def test_what_becomes_infinite_by_unscaling_is_counted(stage: Any) -> None:
    values = np.ones(SIZE, np.float32)
    values[4] = 2.0**120
    gradient = stage(unscale=2.0**20)
    add(gradient, values, [(0, SIZE)])
    gradient.settle()
    assert (gradient.non_finite_count, gradient.first_non_finite) == (1, 4)


def test_the_ranges_of_chunks_come_in_flat_order_whatever_came_first(stage: Any) -> None:
    gradient = stage()
    add(gradient, np.ones(SIZE, np.float32), [(8, SIZE), (0, 5), (5, 8)])
    ranges = [(part.chunk.offset, part.start, part.begin, part.end) for part in gradient.ranges(3, 12)]
    assert ranges == [(0, 3, 3, 5), (5, 5, 0, 3), (8, 8, 0, 4)]
    assert list(gradient.ranges(7, 7)) == []


def test_a_chunk_must_start_where_the_layout_says() -> None:
    layout = place([TensorSpec("a", (5000,), state_precision="int8")], 1)
    state = CpuEngine(threads=1, use_numba=False).allocate(SLOTS, layout.size)
    selection, room = TensorSelection(layout, frozenset()), MemoryBudget(5000).reserve(1, "it")
    gradient = StagedGradient(FLOAT32, selection, state, room, unscale=1.0)
    values = np.ones(5000, np.float32)
    with pytest.raises(InvalidRequestError, match=r"chunk \[300, 400\) starts at no multiple of 256") as refused:
        add(gradient, values, [(300, 400)])
    assert refused.value.metadata == {"field": "chunk", "offset": "300", "end": "400"}
    with pytest.raises(InvalidRequestError, match=r"chunk \[0, 300\) ends inside a block of 8-bit moments") as refused:
        add(gradient, values, [(0, 300)])
    assert refused.value.metadata == {"field": "chunk", "offset": "0", "end": "300"}
    add(gradient, values, [(256, 5000), (0, 256)])  # the last block ends with the tensor
    gradient.complete()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("ranges", [[(0, SIZE)], [(16, SIZE), (0, 16)], [(258, SIZE), (20, 258), (0, 20)]])
def test_what_is_not_finite_is_counted_and_the_first_is_found(stage: Any, ranges: Any, dtype: Any) -> None:
    """In tensors only: padding may hold anything."""
    values = np.ones(SIZE, dtype)
    values[[17, 18, 260]] = np.nan, np.inf, -np.inf
    values[100] = np.nan
    gradient = stage(dtype=dtype)
    add(gradient, values, ranges)
    gradient.settle()
    assert (gradient.non_finite_count, gradient.first_non_finite) == (3, 17)


def test_the_largest_values_are_finite(stage: Any) -> None:
    """The check is that of the sum of squares, which float64 holds for any float32."""
    gradient = stage()
    add(gradient, np.full(SIZE, np.finfo(np.float32).max, np.float32), [(0, SIZE)])
    gradient.complete()
    gradient.settle()
    assert gradient.non_finite_count == 0
    assert all(np.isfinite(gradient.squared_norms()))


def test_a_refused_chunk_leaves_what_came_before(stage: Any) -> None:
    gradient, values = stage(), np.ones(SIZE, np.float32)
    add(gradient, values, [(0, 100)])
    with pytest.raises(InvalidRequestError):
        add(gradient, values, [(50, 150)])
    add(gradient, values, [(100, SIZE)])
    gradient.complete()
    gradient.settle()
    assert gradient.squared_norms() == [19.0, 9.0]


def test_without_sums_no_element_is_looked_at(stage: Any) -> None:
    gradient, values = stage(sums=False), np.full(SIZE, np.nan, np.float32)
    add(gradient, values, [(0, 100), (100, SIZE)])
    gradient.complete()
    assert (gradient.squared_norms(), gradient.non_finite_count) == ([0.0, 0.0], 0)


def test_a_chunk_that_is_popped_is_forgotten_and_counts_as_sent(stage: Any) -> None:
    """A step that is applied as it arrives keeps no chunk, and its norm is of all of them."""
    gradient, values = stage(), np.ones(SIZE, np.float32)
    assert gradient.pop() is None
    for start, end in ((100, SIZE), (0, 100)):
        add(gradient, values, [(start, end)])
        chunk = gradient.pop()
        assert (chunk.offset, chunk.end, len(chunk.gradient)) == (start, end, end - start)
        assert gradient.pop() is None
    gradient.complete()
    assert gradient.squared_norms() == [19.0, 9.0]
    assert list(gradient.drain([(0, SIZE)])) == [(0, SIZE, None)]
    with pytest.raises(InvalidRequestError, match="overlaps"):
        add(gradient, values, [(50, 60)])


def test_closing_twice_gives_the_memory_back_once(stage: Any) -> None:
    gradient = stage()
    assert stage.budget.reserved_bytes == 1000
    add(gradient, np.ones(SIZE, np.float32), [(0, SIZE)])
    gradient.close()
    gradient.close()
    assert stage.budget.reserved_bytes == 0
    assert list(gradient.drain([(0, SIZE)])) == [(0, SIZE, None)]


def in_blocks(values: np.ndarray) -> np.ndarray:
    """Encode values, and lay the bytes where no message is aligned."""
    blocks = np.empty(-(-len(values) // BLOCK), INT8)
    encode_blocks(values, blocks)
    return np.frombuffer(b"x" + blocks.tobytes(), np.uint8)[1:]


@pytest.mark.parametrize(("count", "blocks"), [(1, 1), (256, 1), (257, 2), (512, 2)])
def test_a_payload_of_blocks_holds_all_its_elements_and_no_block_more(count: int, blocks: int) -> None:
    payload = np.zeros(260 * blocks, np.uint8)
    assert typed_payload(payload, count, INT8).shape == (blocks,)
    for wrong in (payload[1:], payload[260:], np.zeros(260 * blocks + 260, np.uint8), np.zeros(count, np.uint8)):
        with pytest.raises(InvalidRequestError, match=f"chunk.count is {count} \\({260 * blocks} bytes of int8\\)"):
            typed_payload(wrong, count, INT8)


def test_chunks_of_blocks_are_staged_as_what_they_decode_to(stage: Any) -> None:
    values = np.random.default_rng(6).standard_normal(SIZE).astype(np.float32)
    payload, norms = in_blocks(values), []
    for cut in (SIZE, 256):
        gradient = stage(dtype=INT8)
        for low, high in [(cut, SIZE), (0, cut)]:
            if low < high:
                gradient.add(low, high - low, payload[low // 256 * 260 : -(-high // 256) * 260])
        gradient.complete()
        norms.append(gradient.squared_norms())
        assert gradient.non_finite_count == 0
        gradient.close()
    decoded = decode_blocks(payload.view(INT8), SIZE).astype(np.float64)
    assert norms[0] == norms[1] == pytest.approx([(decoded[:19] ** 2).sum(), (decoded[256:] ** 2).sum()], rel=1e-12)


@pytest.mark.parametrize("offset", [1, 4, 255, 257, 260])
def test_a_chunk_that_starts_within_a_block_is_refused(stage: Any, offset: int) -> None:
    gradient = stage(dtype=INT8)
    with pytest.raises(
        InvalidRequestError, match="starts at no multiple of 256, where a block of int8 does"
    ) as refused:
        gradient.add(offset, 1, np.zeros(260, np.uint8))
    assert refused.value.metadata == {"field": "chunk", "offset": str(offset), "end": str(offset + 1)}
    gradient.add(0, 256, np.zeros(260, np.uint8))


def test_a_block_that_is_not_finite_is_counted_from_its_first_element(stage: Any) -> None:
    values = np.ones(SIZE, np.float32)
    values[260] = np.nan
    gradient = stage(dtype=INT8)
    gradient.add(0, SIZE, in_blocks(values))
    gradient.complete()
    assert (gradient.non_finite_count, gradient.first_non_finite) == (9, 256)
