"""Replies in messages: whole with the result, chunk by chunk, and as patches where these are smaller."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.dtypes import BFLOAT16, FLOAT32
from stepwire.wire.frames import read_frame
from stepwire.wire.patches import apply_patch
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rpc.reply_messages import ChunkReplyWriter, WholeReplyWriter


def request(dtype: Any = FLOAT32, **fields: Any) -> StepRequest:
    return StepRequest(1, 0, FLOAT32, np.dtype(dtype), True, 1 << 20, ())._replace(**fields)


def test_a_small_reply_travels_with_its_result() -> None:
    writer = WholeReplyWriter(request(), 5)
    writer.buffer(3, 2)[:] = [4, 5]
    writer.flush()
    writer.buffer(0, 3)[:] = [1, 2, 3]
    writer.flush()
    header = pb.AttachResponse()
    header.result.step = 7
    frame = read_frame(pb.AttachResponse, writer.message(header))
    assert frame.payload.view(np.float32).tolist() == [1, 2, 3, 4, 5]
    assert (frame.message.chunk.offset, frame.message.chunk.count, frame.message.result.step) == (0, 5, 7)


def test_where_no_reply_is_wanted_only_the_result_travels() -> None:
    header = pb.AttachResponse()
    header.result.step = 7
    frame = read_frame(pb.AttachResponse, WholeReplyWriter(request(reply=False), 5).message(header))
    assert (frame.payload.size, frame.message.HasField("chunk"), frame.message.result.step) == (0, False, 7)


@pytest.fixture
def sent() -> list[bytes]:
    return []


def frames(sent: list[bytes]) -> list[Any]:
    return [read_frame(pb.AttachResponse, message) for message in sent]


def test_chunks_are_sent_in_the_order_in_which_they_are_complete(sent: list[bytes]) -> None:
    writer = ChunkReplyWriter(request(), sent.append)
    first, second = writer.buffer(100, 2), writer.buffer(0, 1)
    second[:] = 3
    first[:] = [1, 2]
    assert sent == []
    writer.flush()
    writer.flush()
    found = [(f.message.chunk.offset, f.payload.view(np.float32).tolist()) for f in frames(sent)]
    assert found == [(100, [1, 2]), (0, [3])]


SIZE = 40_000


def patched(sent: list[bytes], before: Any, after: Any) -> None:
    writer = ChunkReplyWriter(request(BFLOAT16, reply_base=3), sent.append)
    values = writer.buffer(16, len(after))
    writer.before()[:] = before
    values[:] = after
    writer.flush()


def test_a_chunk_of_which_little_changed_is_a_patch(sent: list[bytes]) -> None:
    before = np.arange(SIZE).astype(BFLOAT16)
    after = before.copy()
    after[::7] += 1000
    patched(sent, before, after)
    (frame,) = frames(sent)
    assert (frame.message.chunk.patch, frame.message.chunk.offset, frame.message.chunk.count) == (True, 16, SIZE)
    assert frame.payload.size < 2 * SIZE
    held = before.view(np.uint16).copy()
    apply_patch(held, frame.payload)
    assert held.tobytes() == after.tobytes()


def test_a_chunk_of_which_everything_changed_is_whole(sent: list[bytes]) -> None:
    before = np.zeros(SIZE, BFLOAT16)
    after = np.arange(1, SIZE + 1).astype(BFLOAT16)
    patched(sent, before, after)
    (frame,) = frames(sent)
    assert frame.message.chunk.patch is False
    assert frame.payload.tobytes() == after.tobytes()


def test_a_chunk_in_which_nothing_changed_is_not_sent(sent: list[bytes]) -> None:
    values = np.full(SIZE, np.nan, BFLOAT16)
    patched(sent, values, values)
    assert sent == []


def test_a_zero_that_changed_its_sign_changed(sent: list[bytes]) -> None:
    patched(sent, np.zeros(SIZE, BFLOAT16), -np.zeros(SIZE, BFLOAT16))
    (frame,) = frames(sent)
    assert frame.payload.tobytes() == (-np.zeros(SIZE, BFLOAT16)).tobytes()
