"""The messages of pulls and loads, without a server."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from stepwire.arrays.packing import Packer
from stepwire.errors import UnavailableError
from stepwire.layout import TensorSpec, place
from stepwire.links.link import Load
from stepwire.links.pull_and_load import load_messages, read_pull
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import state_pb2, tensor_pb2
from stepwire.wire.dtypes import BFLOAT16, FLOAT32

PACKER = Packer(place([TensorSpec("a", (3,)), TensorSpec("b", (2,))], 1))
HEADER = state_pb2.PullHeader(step=4, load=2, epoch=1, tensor_steps=[4, 4])


def answer(*chunks: tuple[str, int, list[float]], header: bool = True, dtype: type = np.float32) -> Iterator[bytes]:
    """Messages of a pull: `(slot, offset, values)` each."""
    if header:
        yield pb.PullResponse(header=HEADER).SerializeToString()
    for slot, offset, values in chunks:
        yield pb.PullResponse(
            slot=slot,
            chunk=tensor_pb2.Chunk(offset=offset, count=len(values)),
            payload=np.array(values, dtype).tobytes(),
        ).SerializeToString()


def empty() -> list[np.ndarray]:
    return [np.zeros(3, np.float32), np.zeros(2, np.float32)]


def test_a_pull_is_read_into_its_slots() -> None:
    targets = {"param": empty(), "exp_avg": empty()}
    messages = answer(("param", 0, [1, 2]), ("param", 2, [3, 4, 5]), ("exp_avg", 0, [6, 7, 8, 9, 10]))
    assert read_pull(messages, PACKER, FLOAT32, targets) == HEADER
    assert [array.tolist() for array in targets["param"]] == [[1, 2, 3], [4, 5]]
    assert [array.tolist() for array in targets["exp_avg"]] == [[6, 7, 8], [9, 10]]


def test_a_pull_in_another_encoding_is_decoded() -> None:
    targets = {"param": empty()}
    read_pull(answer(("param", 0, [1, 2, 3, 4, 5]), dtype=ml_dtypes.bfloat16), PACKER, BFLOAT16, targets)
    assert [array.tolist() for array in targets["param"]] == [[1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("messages", "missing"),
    [
        (answer(), 5),
        (answer(("param", 0, [1, 2, 3])), 2),
        (iter(()), 5),
        (answer(("param", 0, [1, 2, 3, 4, 5]), header=False), 0),
    ],
    ids=["no chunk", "half", "nothing", "no header"],
)
def test_a_pull_that_ends_early_says_how_much_is_missing(messages: Iterator[bytes], missing: int) -> None:
    with pytest.raises(UnavailableError, match=f"ended a pull {missing} elements early"):
        read_pull(messages, PACKER, FLOAT32, {"param": empty()})


def test_a_load_is_opening_chunks_of_each_slot_and_commit() -> None:
    opening = state_pb2.LoadOpen(session_id="s", slots=["param", "exp_avg"])
    sources = {
        "param": [np.float32([1, 2, 3]), np.float32([4, 5])],
        "exp_avg": [np.array([6, 7, 8], BFLOAT16), np.float16([9, 10])],
    }
    first, *chunks, last = map(pb.LoadRequest.FromString, load_messages(opening, PACKER, Load(sources), 16))
    assert (first.open.session_id, first.open.dtype) == ("s", tensor_pb2.DTYPE_FLOAT32)
    assert [
        (chunk.slot, chunk.chunk.offset, np.frombuffer(chunk.payload, np.float32).tolist()) for chunk in chunks
    ] == [
        ("param", 0, [1, 2, 3, 4]),
        ("param", 4, [5]),
        ("exp_avg", 0, [6, 7, 8, 9]),
        ("exp_avg", 4, [10]),
    ]
    assert last == pb.LoadRequest(commit=True)
