"""The messages of a step: when they are made, and what they bring."""

from __future__ import annotations

import numpy as np
import pytest

from stepwire.arrays.error_feedback import ErrorFeedback
from stepwire.arrays.packing import Packer
from stepwire.layout import TensorSpec, place
from stepwire.steps.call import StepCall
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire.wire.dtypes import FLOAT32, wire_bytes
from stepwire.wire.frames import read_frame
from stepwire.wire.int8_blocks import BLOCK, INT8

SIZE = 1000
PACKER = Packer(place([TensorSpec("w", (SIZE,))], 1))


@pytest.mark.parametrize("chunk_bytes", [4000, 400])
def test_the_first_message_opens_a_step_and_the_last_ends_it(chunk_bytes: int) -> None:
    gradient = np.arange(SIZE, dtype=np.float32)
    commit = step_pb2.StepCommit(clip_coefficient=0.5)
    call = StepCall(step_pb2.StepBegin(step=3), [gradient], FLOAT32, (), FLOAT32, commit=commit)
    frames = [read_frame(pb.AttachRequest, data) for data in call.messages(PACKER, chunk_bytes, again=False)]
    chunks = [frame.message.chunk for frame in frames]
    count = chunk_bytes // 4
    assert [(chunk.offset, chunk.count) for chunk in chunks] == [(low, count) for low in range(0, SIZE, count)]
    assert np.concatenate([frame.payload for frame in frames]).tobytes() == gradient.tobytes()
    assert [frame.message.HasField("begin") for frame in frames] == [True] + [False] * (len(frames) - 1)
    assert [frame.message.HasField("commit") for frame in frames] == [False] * (len(frames) - 1) + [True]
    assert (frames[0].message.begin, frames[-1].message.commit) == (call.begin, commit)


def test_one_message_is_packed_at_once_and_several_as_they_are_asked_for() -> None:
    for chunk_bytes, brought in [(4000, [1.0]), (2000, [2.0, 3.0])]:
        gradient = np.full(SIZE, 1.0, np.float32)
        call = StepCall(step_pb2.StepBegin(step=1), [gradient], FLOAT32, (), FLOAT32)
        firsts = []
        messages = call.messages(PACKER, chunk_bytes, again=False)
        gradient[:] = 2.0
        for data in messages:
            firsts.append(float(read_frame(pb.AttachRequest, data).payload.view(np.float32)[0]))
            gradient[:] += 1.0
        assert firsts == brought


def test_a_sending_that_broke_off_leaves_no_error_in_the_next() -> None:
    """Its thread may still pack a chunk while the next gradient is sent, and after that one was applied."""
    packer = Packer(place([TensorSpec("w", (4 * BLOCK,))], 1))

    def call(seed: int, feedback: ErrorFeedback) -> StepCall:
        gradient = np.random.default_rng(seed).standard_normal(4 * BLOCK).astype(np.float32)
        return StepCall(step_pb2.StepBegin(step=1), [gradient], INT8, (), FLOAT32, feedback=feedback)

    alone, disturbed = ErrorFeedback(4 * BLOCK), ErrorFeedback(4 * BLOCK)
    list(call(2, alone).messages(packer, wire_bytes(INT8, BLOCK), again=False))
    alone.accept()
    broken_off = call(1, disturbed).messages(packer, wire_bytes(INT8, BLOCK), again=False)
    next(broken_off)
    messages = call(2, disturbed).messages(packer, wire_bytes(INT8, BLOCK), again=False)
    next(messages)
    next(broken_off)
    assert len(list(messages)) == 3
    next(broken_off)
    disturbed.accept()
    next(broken_off)
    disturbed.accept()
    assert disturbed.residual.tobytes() == alone.residual.tobytes()
