"""Between users' arrays and flat chunks."""

from __future__ import annotations

import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwire.arrays.packing import PackedRange, Packer, named_arrays
from stepwire.arrays.ranges import Ranges
from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import TensorSpec, place
from stepwire.wire.dtypes import wire_items
from stepwire.wire.int8_blocks import BLOCK, INT8, decode_blocks, encode_blocks

BFLOAT16 = ml_dtypes.bfloat16
LAYOUT = place(
    [TensorSpec("w", (3, 4)), TensorSpec("s", ()), TensorSpec("e", (0, 7)), TensorSpec("b", (5,), 1)],
    2,
)
SHAPES = {"w": (3, 4), "s": (), "e": (0, 7), "b": (5,)}


def numbered(dtype: npt.DTypeLike = np.float32) -> dict[str, npt.NDArray[Any]]:
    """Arrays for LAYOUT whose elements are all different and exact in bfloat16."""
    start, arrays = 1, {}
    for name, shape in SHAPES.items():
        count = int(np.prod(shape))
        arrays[name] = np.arange(start, start + count).reshape(shape).astype(dtype)
        start += count
    return arrays


def pack(packer: Packer, arrays: Any, most: int, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Send arrays through chunks of at most `most` elements into one flat array; unwritten elements stay NaN."""
    flat = packer.ordered(arrays, "gradients")
    space = np.full(packer.layout.size, np.nan, dtype)
    for offset, count, ranges in packer.chunks(most):
        packer.write(flat, ranges, space[offset : offset + count])
    return space


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
def test_arrays_of_a_dict_keep_their_names(dtype: Any) -> None:
    named = named_arrays(numbered(dtype), "gradients")
    assert {name: (array.shape, array.dtype) for name, array in named.items()} == {
        name: (shape, np.dtype(dtype)) for name, shape in SHAPES.items()
    }


def test_arrays_of_a_sequence_are_named_by_position() -> None:
    for container in ([np.float32(1), np.zeros(2, np.float32)], (np.float32(1), np.zeros(2, np.float32))):
        assert list(named_arrays(container, "gradients")) == ["0", "1"]


@pytest.mark.parametrize("container", [np.zeros(3, np.float32), 1.0, None, "ab", b"ab", {1.0}, iter(())])
def test_what_is_no_container_is_refused(container: Any) -> None:
    with pytest.raises(InvalidRequestError, match="is neither a dict nor a list of arrays") as refused:
        named_arrays(container, "gradients")
    assert refused.value.reason is Reason.INVALID_TENSOR
    assert type(container).__name__ in str(refused.value)


def test_a_name_that_is_no_string_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="the name 3 is not a string"):
        named_arrays({3: np.zeros(1, np.float32)}, "gradients")  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [[1.0, 2.0], np.zeros(2), np.zeros(2, np.int32), 1.5, "x", None, [object()]])
def test_a_dtype_that_does_not_travel_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="is not served; cast it to float32, bfloat16 or float16") as refused:
        named_arrays({"w": value}, "gradients")
    assert refused.value.metadata == {"field": "gradients['w']"}


def test_elements_lie_where_the_layout_says() -> None:
    space = pack(Packer(LAYOUT), numbered(), 1000)
    assert space[:13].tolist() == list(range(1, 14))
    assert space[13:256].tolist() == [0.0] * 243
    assert space[256:].tolist() == [14.0, 15.0, 16.0, 17.0, 18.0]


@pytest.mark.parametrize("most", [1, 2, 5, 13, 100, 255, 256, 257, 261, 1 << 20])
def test_chunks_of_any_size_carry_the_same(most: int) -> None:
    packer = Packer(LAYOUT)
    chunks = packer.chunks(most)
    assert [chunk.offset for chunk in chunks] == list(range(0, LAYOUT.size, most))
    assert sum(chunk.elements for chunk in chunks) == LAYOUT.size
    assert pack(packer, numbered(), most).tobytes() == pack(packer, numbered(), 1 << 20).tobytes()


@given(st.integers(0, 260), st.integers(1, 261))
def test_the_ranges_of_a_chunk_cover_its_tensors_exactly(offset: int, count: int) -> None:
    packer, found = Packer(LAYOUT), {}
    for packed in packer.ranges(offset, count):
        tensor = LAYOUT.tensors[packed.tensor]
        for index in range(packed.begin, packed.end):
            found[tensor.offset + index] = offset + packed.position + index - packed.begin
    tensors = {position for tensor in LAYOUT.tensors for position in range(tensor.offset, tensor.end)}
    assert found == {position: position for position in tensors & set(range(offset, offset + count))}


def test_the_ranges_of_a_chunk_are_cached() -> None:
    packer = Packer(LAYOUT)
    assert packer.ranges(10, 250) == [PackedRange(0, 10, 12, 0), PackedRange(1, 0, 1, 2), PackedRange(3, 0, 4, 246)]
    assert packer.ranges(10, 250) is packer.ranges(10, 250)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
@pytest.mark.parametrize("most", [3, 128, 1000])
def test_what_was_packed_is_unpacked(dtype: Any, most: int) -> None:
    packer = Packer(LAYOUT)
    space = pack(packer, numbered(), most, dtype)
    container, _ = packer.allocate_named(np.dtype(dtype))
    targets = packer.targets(container, "out")
    for offset, count, ranges in packer.chunks(most):
        packer.read(targets, ranges, space[offset : offset + count])
    for name, expected in numbered().items():
        assert container[name].dtype == dtype
        assert container[name].astype(np.float32).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(1, 13, dtype=np.float32).reshape(4, 3).T.copy().T.reshape(4, 3).T,
        np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        np.arange(48, dtype=np.float32).reshape(6, 8)[::2, ::2],
        np.arange(12, dtype=np.float32)[::-1].reshape(3, 4),
        np.broadcast_to(np.float32(7), (3, 4)),
    ],
    ids=["transposed", "fortran", "strided", "reversed", "broadcast"],
)
def test_arrays_that_are_not_contiguous_are_sent_row_by_row(array: npt.NDArray[np.float32]) -> None:
    space = pack(Packer(LAYOUT), numbered() | {"w": array}, 1000)
    assert space[:12].tolist() == [float(array[row, column]) for row in range(3) for column in range(4)]


def test_a_tensor_without_an_array_takes_no_memory_of_its_size() -> None:
    """A table of 2⁵⁰ elements has rows, and never an array."""
    packer = Packer(place([TensorSpec("w", (3,)), TensorSpec("t", (1 << 44, 64), table="torch_sparse")], 1))
    flat, missing = packer.present({"w": np.ones(3, np.float32)}, "gradients", frozenset({"t"}))
    assert ([len(each) for each in flat], missing) == ([3, 0], {1})
    with pytest.raises(InvalidRequestError, match=r"missing \['w'\], unknown \['v'\]"):
        packer.present({"v": np.ones(3, np.float32)}, "gradients", frozenset({"t"}))


def test_a_contiguous_array_is_not_copied() -> None:
    arrays = numbered()
    flat = Packer(LAYOUT).ordered(arrays, "gradients")
    assert np.shares_memory(flat[0], arrays["w"])


def test_a_list_is_packed_by_position() -> None:
    packer = Packer(place([TensorSpec("0", (2,)), TensorSpec("1", ())], 1))
    assert pack(packer, [np.float32([1, 2]), np.float32(3)], 100).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("change", "missing", "unknown"),
    [
        ({"w": None}, ["w"], []),
        ({"w": None, "x": np.zeros((3, 4), np.float32)}, ["w"], ["x"]),
        ({"x": np.zeros(1, np.float32)}, [], ["x"]),
    ],
)
def test_names_that_do_not_match_are_listed(change: dict[str, Any], missing: list[str], unknown: list[str]) -> None:
    arrays = {name: value for name, value in (numbered() | change).items() if value is not None}
    with pytest.raises(InvalidRequestError) as refused:
        Packer(LAYOUT).ordered(arrays, "gradients")
    assert refused.value.reason is Reason.INVALID_TENSOR
    assert f"missing {missing}, unknown {unknown}" in str(refused.value)


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 4, 1), (3, 5), ()])
def test_a_wrong_shape_is_refused_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        Packer(LAYOUT).ordered(numbered() | {"w": np.zeros(shape, np.float32)}, "gradients")
    assert str(refused.value) == f"gradients['w']: shape {shape} is not the session's (3, 4)"


def test_a_reply_is_one_buffer_seen_as_arrays() -> None:
    container, _ = Packer(LAYOUT).allocate_named(np.dtype(np.float16))
    assert {name: array.shape for name, array in container.items()} == SHAPES
    assert len({id(array.base) for array in container.values()}) == 1


def test_a_reply_for_a_list_is_a_list_in_its_order() -> None:
    packer = Packer(place([TensorSpec(str(index), (index,), index % 2) for index in range(12)], 2))
    targets = packer.to_come(np.dtype(np.float32), None)
    assert [array.shape for array in targets.container] == [(index,) for index in range(12)]
    assert targets.container is targets.container


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["2", "0", "4", "1", "3"], "20413"),
        (["0", "1", "2", "3", "4"], "01234"),
        (["4", "0"], "01234"),
        (["4", "3", "2", "1", "0", "x"], "01234"),
    ],
)
def test_a_reply_for_a_dict_has_the_order_of_its_names_if_they_are_the_tensors(names: list[str], order: str) -> None:
    packer = Packer(place([TensorSpec(str(index), (index,), index % 2) for index in range(5)], 2))
    named = packer.to_come(np.dtype(np.float32), names).container
    assert [(name, array.shape) for name, array in named.items()] == [(name, (int(name),)) for name in order]


@pytest.mark.parametrize("names", [list("01234"), None], ids=["dict", "list"])
def test_the_views_of_a_reply_are_those_of_its_arrays(names: Any) -> None:
    packer = Packer(place([TensorSpec(str(index), (index, 2), index % 2) for index in range(5)], 2))
    flat = packer.to_come(np.dtype(np.float16), names)
    assert len(flat) == len(flat[1:]) + 1 == 5
    for mine, target in zip(flat, packer.targets(flat.container, "out"), strict=True):
        assert (mine.shape, mine.dtype) == (target.shape, target.dtype)
        assert mine.size == 0 or np.shares_memory(mine, target)


def test_arrays_that_were_made_in_the_middle_of_their_making_stay() -> None:
    """As by the handler of a signal, which has read the reply into them."""
    made: list[Any] = []

    def make() -> Any:
        made.append(values := np.zeros(3))
        if len(made) == 1:
            assert ranges.whole is made[1]
        return values, [len(made)]

    ranges = Ranges(make, [slice(0, 3)])
    assert (ranges.whole is made[1], ranges.container, len(made)) == (True, [2], 2)


def test_chunks_are_cut_anew_for_another_size_and_another_encoding() -> None:
    packer = Packer(place([TensorSpec("w", (1000,))], 1))
    asked = [(300, np.dtype(np.float32)), (300, INT8), (600, INT8), (300, np.dtype(np.float32))]
    cuts = [[(config.offset, config.elements) for config in packer.chunks(most, dtype)] for most, dtype in asked]
    assert cuts[0] == cuts[3] == [(0, 300), (300, 300), (600, 300), (900, 100)]
    assert cuts[1] == [(0, 256), (256, 256), (512, 256), (768, 232)]
    assert cuts[2] == [(0, 512), (512, 488)]


def test_targets_write_into_the_users_arrays() -> None:
    arrays = numbered()
    targets = Packer(LAYOUT).targets(arrays, "out")
    for target in targets:
        target[...] = -1
    assert all((array == -1).all() for array in arrays.values())


@pytest.mark.parametrize("kind", [list, tuple])
def test_targets_of_a_sequence_go_by_position(kind: Any) -> None:
    packer = Packer(place([TensorSpec("0", (2,), 1), TensorSpec("1", (3,), 0)], 2))
    arrays = kind([np.zeros(2, np.float32), np.zeros(3, np.float32)])
    packer.targets(arrays, "out")[0][...] = 5
    assert [array.tolist() for array in arrays] == [[0, 0], [5, 5, 5]]


def _read_only() -> npt.NDArray[np.float32]:
    array = np.zeros((3, 4), np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "array",
    [_read_only(), np.zeros((4, 3), np.float32).T, np.zeros((6, 4), np.float32)[::2]],
    ids=["read-only", "transposed", "strided"],
)
def test_arrays_that_cannot_be_written_in_place_are_refused(array: npt.NDArray[np.float32]) -> None:
    with pytest.raises(InvalidRequestError, match="read-only or not C-contiguous") as refused:
        Packer(LAYOUT).targets(numbered() | {"w": array}, "out")
    assert refused.value.metadata == {"field": "out['w']"}


def test_a_memmap_is_written_in_place(tmp_path: pathlib.Path) -> None:
    arrays = numbered() | {"w": np.memmap(tmp_path / "w", np.float32, "w+", shape=(3, 4))}
    for target in Packer(LAYOUT).targets(arrays, "out"):
        target[...] = 7
    assert (arrays["w"] == 7).all()
    with pytest.raises(InvalidRequestError, match=r"out\['w'\]: list is not a NumPy array"):
        Packer(LAYOUT).targets(numbered() | {"w": list(np.float32(arrays["w"]))}, "out")


def test_a_mask_that_masks_something_is_refused() -> None:
    """A server would step the hidden values; so would a reply be written under the mask."""
    masked = np.ma.masked_array(numbered()["w"], mask=np.zeros((3, 4), bool))
    Packer(LAYOUT).ordered(numbered() | {"w": masked}, "gradients")
    masked[1, 2] = np.ma.masked
    for check in (Packer(LAYOUT).ordered, Packer(LAYOUT).targets):
        with pytest.raises(InvalidRequestError, match=r"g\['w'\]: 1 of its 12 elements are masked, .*\.filled\(0\)"):
            check(numbered() | {"w": masked}, "g")


def test_users_have_the_tensors_in_their_own_order() -> None:
    packer = Packer(place([TensorSpec("a", (2,), 1), TensorSpec("b", (3,), 0)], 2))
    named, flat = packer.allocate_named(np.dtype(np.float32))
    assert list(named) == ["a", "b"]
    assert [len(array) for array in flat] == [3, 2]
    assert list(packer.in_order({"b": 1, "a": 2})) == ["a", "b"]


def test_float16_overflow_is_sent_as_infinity_without_a_warning() -> None:
    packer = Packer(place([TensorSpec("w", (3,))], 1))
    chunk = np.empty(3, np.float16)
    packer.write([np.array([1.0, 1e6, -1e6], np.float32)], packer.ranges(0, 3), chunk)
    assert chunk.tolist() == [1.0, np.inf, -np.inf]


# --- tensors without a gradient ---------------------------------------------------------------------------------

OPTIONAL = frozenset({"w", "b"})


def test_what_may_be_left_out_is_told_by_index() -> None:
    packer, arrays = Packer(LAYOUT), numbered()
    flat, missing = packer.present(arrays, "gradients", OPTIONAL)
    assert (missing, [len(array) for array in flat]) == (frozenset(), [12, 1, 0, 5])
    for left_out in ({"s": arrays["s"], "e": arrays["e"]}, arrays | {"w": None, "b": None}):
        flat, missing = packer.present(left_out, "gradients", OPTIONAL)
        assert (missing, [len(array) for array in flat]) == (frozenset({0, 3}), [0, 1, 0, 0])
        assert flat[1].tolist() == [13.0]


def test_a_list_leaves_out_by_none() -> None:
    packer = Packer(place([TensorSpec("0", (2,)), TensorSpec("1", (3,))], 1))
    flat, missing = packer.present([None, np.ones(3, np.float32)], "gradients", frozenset({"0"}))  # type: ignore[list-item]
    assert (missing, [len(array) for array in flat]) == (frozenset({0}), [0, 3])


@pytest.mark.parametrize("arrays", [5, None, 2.5])
def test_what_is_no_container_is_refused_with_its_value(arrays: Any) -> None:
    with pytest.raises(InvalidRequestError, match="gradients"):
        Packer(LAYOUT).present(arrays, "gradients", OPTIONAL)


@pytest.mark.parametrize("name", ["s", "e"])
def test_what_may_not_be_left_out_is_missed_by_name(name: str) -> None:
    arrays = numbered()
    del arrays[name], arrays["w"]
    with pytest.raises(InvalidRequestError, match=f"missing \\['{name}'\\]") as refused:
        Packer(LAYOUT).present(arrays, "gradients", OPTIONAL)
    assert refused.value.reason is Reason.INVALID_TENSOR


def test_what_is_left_out_is_zero_in_its_chunk() -> None:
    packer, arrays = Packer(LAYOUT), numbered()
    flat, _ = packer.present({name: arrays[name] for name in "seb"}, "gradients", OPTIONAL)
    (config,) = packer.chunks(1000)
    chunk = np.full(config.elements, np.nan, np.float32)
    packer.write(flat, config.ranges, chunk)
    expected = np.zeros(261, np.float32)
    expected[12], expected[256:] = 13.0, arrays["b"]
    assert chunk.tolist() == expected.tolist()


@pytest.mark.parametrize("most", [256, 300, 511, 1000, 5000])
def test_chunks_start_where_the_layout_says(most: int) -> None:
    packer = Packer(place([TensorSpec("a", (5000,), state_precision="int8"), TensorSpec("b", (7,))], 1))
    chunks = packer.chunks(most)
    assert all(offset % 256 == 0 and 0 < count <= most for offset, count, _ in chunks)
    assert [offset for offset, _, _ in chunks] == [0, *np.cumsum([count for _, count, _ in chunks])[:-1]]
    assert sum(count for _, count, _ in chunks) == 5007


def in_blocks(packer: Packer, arrays: Any, most: int) -> npt.NDArray[np.float32]:
    """Send arrays in chunks of blocks of 8 bits; return the decoded values of the whole space."""
    flat, _ = packer.present(arrays, "gradients", frozenset(packer._indices))
    space = np.zeros(wire_items(INT8, packer.layout.size), INT8)
    for offset, count, ranges in packer.chunks(most, INT8):
        assert offset % BLOCK == 0
        packer.write(flat, ranges, space[offset // BLOCK :][: wire_items(INT8, count)], offset)
    return decode_blocks(space, packer.layout.size)


MANY = place([TensorSpec(f"t{k}", (97 * k % 800,), k % 2) for k in range(60)], 2)


@pytest.mark.parametrize("most", [256, 511, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
def test_blocks_have_the_elements_wherever_chunks_end(dtype: Any, most: int) -> None:
    random = np.random.default_rng(3)
    arrays = {tensor.spec.name: random.standard_normal(tensor.count).astype(dtype) for tensor in MANY.tensors}
    flat = np.zeros(-(-MANY.size // BLOCK) * BLOCK, np.float32)
    for tensor in MANY.tensors:
        flat[tensor.offset : tensor.end] = arrays[tensor.spec.name]
    blocks = np.empty(len(flat) // BLOCK, INT8)
    encode_blocks(flat, blocks)
    assert in_blocks(Packer(MANY), arrays, most).tobytes() == decode_blocks(blocks, MANY.size).tobytes()


def test_blocks_have_nothing_of_tensors_without_a_gradient_and_of_frozen_ones() -> None:
    layout = place([TensorSpec("a", (100,)), TensorSpec("b", (100,), frozen=True), TensorSpec("c", (20,))], 1)
    arrays = {"a": None, "b": np.full(100, np.inf, np.float32), "c": np.full(20, 3.0, np.float32)}
    assert in_blocks(Packer(layout), arrays, 256).tolist() == [0.0] * 200 + [3.0] * 20
