"""Replies as they arrive: the places of chunks, the tensors that are whole, missing elements, and patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwire.arrays.packing import Packer
from stepwire.errors import InvalidRequestError, UnavailableError
from stepwire.layout import TensorSpec, place
from stepwire.steps.call import StepCall
from stepwire.steps.reply import ReplyReader
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2, tensor_pb2
from stepwire.wire.dtypes import BFLOAT16, FLOAT32
from stepwire.wire.frames import Frame
from stepwire.wire.patches import encode_patch

LAYOUT = place([TensorSpec("w", (20,)), TensorSpec("empty", (0,)), TensorSpec("b", (12,), 1)], 2)


def call(dtype: Any = FLOAT32, *, mode: int = step_pb2.REPLY_MODE_PARAMETERS, **fields: Any) -> StepCall:
    targets = [np.full(tensor.count, np.nan, dtype) for tensor in LAYOUT.tensors]
    begin = step_pb2.StepBegin(step=4, reply={"mode": mode})
    return StepCall(begin, (), FLOAT32, targets, np.dtype(dtype), **fields)


def chunk(offset: int, values: Any, *, patch: bool = False, payload: Any = None) -> Frame:
    message = pb.AttachResponse(chunk=tensor_pb2.Chunk(offset=offset, count=len(values), patch=patch))
    data = values.tobytes() if payload is None else payload
    return Frame(message, np.frombuffer(data, np.uint8))


SPACE = np.arange(LAYOUT.size, dtype=np.float32)


def test_chunks_go_where_they_belong_in_any_order() -> None:
    wanted = call()
    reader = ReplyReader(Packer(LAYOUT), wanted)
    for start, end in [(260, LAYOUT.size), (0, 10), (10, 260)]:
        reader.read(chunk(start, SPACE[start:end]))
    reader.finish()
    assert wanted.targets[0].tolist() == list(range(20))
    assert wanted.targets[2].tolist() == list(range(256, 268))


def test_tensors_are_told_when_their_last_element_has_come() -> None:
    told: list[int] = []
    reader = ReplyReader(Packer(LAYOUT), call(on_tensor=told.append))
    seen = []
    for start, end in [(10, 258), (260, LAYOUT.size), (0, 10), (258, 260)]:
        reader.read(chunk(start, SPACE[start:end]))
        seen.append(list(told))
    assert seen == [[], [], [0], [0, 2]]
    reader.finish()
    assert told == [0, 2, 1], "no chunk brings a tensor of no elements"


def test_a_reply_that_ends_early_is_told() -> None:
    reader = ReplyReader(Packer(LAYOUT), call())
    reader.read(chunk(0, SPACE[:10]))
    with pytest.raises(UnavailableError, match=f"the reply to step 4 lacks {LAYOUT.size - 10} elements"):
        reader.finish()


def test_where_none_is_wanted_nothing_is_missing() -> None:
    reader = ReplyReader(Packer(LAYOUT), call(mode=step_pb2.REPLY_MODE_NONE))
    reader.read(Frame(pb.AttachResponse(), np.empty(0, np.uint8)))
    reader.finish()


def test_patches_change_the_parameters_and_everything_is_handed_out() -> None:
    patched = SPACE.astype(BFLOAT16)
    after = patched.copy()
    after[[3, 19, 256]] = [7.5, -1.0, 0.25]
    patch = encode_patch(patched[:200].view(np.uint16), after[:200].view(np.uint16))
    assert patch is not None
    wanted = call(BFLOAT16, mode=step_pb2.REPLY_MODE_CHANGED, patched=patched)
    reader = ReplyReader(Packer(LAYOUT), wanted)
    reader.read(chunk(0, after[:200], patch=True, payload=patch))
    reader.read(chunk(200, after[200:]))
    reader.finish()
    assert patched.tobytes() == after.tobytes()
    assert wanted.targets[0].tobytes() == after[:20].tobytes()
    assert wanted.targets[2].tobytes() == after[256:].tobytes()


def test_a_patch_that_is_none_is_refused() -> None:
    wanted = call(BFLOAT16, mode=step_pb2.REPLY_MODE_CHANGED, patched=np.zeros(LAYOUT.size, BFLOAT16))
    with pytest.raises(InvalidRequestError, match="the patch of 8 values"):
        ReplyReader(Packer(LAYOUT), wanted).read(chunk(0, np.zeros(8), patch=True, payload=b"\xff"))
