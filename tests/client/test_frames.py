"""Bulk messages written and read by hand, held against the protobuf library for every message it makes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwire.errors import InvalidRequestError, Reason
from stepwire.frames import FrameBuffer, read_frame
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2, tensor_pb2

UINT64 = st.integers(0, 2**64 - 1)
PAYLOAD_TAG = b"\x7a"


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def length_delimited(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


@st.composite
def headers(draw: st.DrawFn) -> pb.AttachRequest:
    """An AttachRequest without payload, any of whose fields may be there."""
    message = pb.AttachRequest(padding=draw(st.binary(max_size=40)))
    if draw(st.booleans()):
        message.open.CopyFrom(pb.AttachOpen(session_id=draw(st.text(max_size=40)), attach_token=draw(UINT64)))
    if draw(st.booleans()):
        message.begin.CopyFrom(step_pb2.StepBegin(step=draw(UINT64), overlap=draw(st.booleans())))
        message.begin.hyperparameters.add(lr=draw(st.floats(allow_nan=False)))
    if draw(st.booleans()):
        message.chunk.CopyFrom(tensor_pb2.Chunk(offset=draw(UINT64), count=draw(UINT64), rows=draw(st.lists(UINT64))))
    if draw(st.booleans()):
        message.commit.SetInParent()
    return message


UNKNOWN_FIELDS = st.one_of(
    st.tuples(st.integers(100, 2**28), UINT64).map(lambda field: varint(field[0] << 3) + varint(field[1])),
    st.tuples(st.integers(100, 2**28), st.binary(min_size=8, max_size=8)).map(
        lambda field: varint(field[0] << 3 | 1) + field[1]
    ),
    st.tuples(st.integers(100, 2**28), st.binary(max_size=200)).map(lambda field: length_delimited(*field)),
    st.tuples(st.integers(100, 2**28), st.binary(min_size=4, max_size=4)).map(
        lambda field: varint(field[0] << 3 | 5) + field[1]
    ),
    # Our payload's number with another wire type is an unknown field, not a payload.
    UINT64.map(lambda value: b"\x78" + varint(value)),
)


@st.composite
def wire_messages(draw: st.DrawFn) -> bytes:
    """A valid AttachRequest whose fields come in any order, repeated, and among unknown ones."""
    pieces = [message.SerializeToString() for message in draw(st.lists(headers(), max_size=3))]
    pieces += [length_delimited(15, body) for body in draw(st.lists(st.binary(max_size=300), max_size=3))]
    pieces += draw(st.lists(UNKNOWN_FIELDS, max_size=4))
    return b"".join(draw(st.permutations(pieces)))


@given(wire_messages())
def test_reading_agrees_with_protobuf(data: bytes) -> None:
    expected = pb.AttachRequest.FromString(data)
    frame = read_frame(pb.AttachRequest, data)
    assert frame.payload.tobytes() == expected.payload
    expected.ClearField("payload")
    assert frame.message.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@given(headers(), st.binary(max_size=2000))
def test_protobuf_reads_what_a_frame_buffer_writes(header: pb.AttachRequest, payload: bytes) -> None:
    header.ClearField("padding")
    frame = FrameBuffer(header, len(payload))
    frame.payload(np.uint8)[:] = np.frombuffer(payload, np.uint8)
    read = pb.AttachRequest.FromString(frame.data)
    assert read.payload == payload
    read.ClearField("payload")
    read.ClearField("padding")
    assert read == header


@pytest.mark.parametrize("id_length", range(40))
def test_a_payload_lies_at_a_multiple_of_16_in_message_and_memory(id_length: int) -> None:
    """Whatever the header's length: kernels then read aligned vectors out of received messages."""
    header = pb.AttachRequest(open=pb.AttachOpen(session_id="x" * id_length))
    frame = FrameBuffer(header, 64)
    written = frame.payload(np.float32)
    written[:] = np.arange(16)
    read = read_frame(pb.AttachRequest, frame.data).payload
    assert frame.payload_start % 16 == 0
    assert written.__array_interface__["data"][0] % 16 == 0
    assert read.__array_interface__["data"][0] % 16 == 0
    assert read.view(np.float32).tolist() == list(range(16))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_payload_is_written_in_place_in_any_wire_dtype(dtype: Any) -> None:
    values = np.array([1.5, -2.0, 0.0, 96.0], dtype)
    frame = FrameBuffer(pb.PullResponse(slot="param"), values.nbytes)
    frame.payload(dtype)[:] = values
    read = read_frame(pb.PullResponse, frame.data)
    assert read.message.slot == "param"
    assert read.payload.view(dtype).tolist() == values.tolist()


def test_a_message_without_payload_has_an_empty_one() -> None:
    frame = read_frame(pb.AttachRequest, pb.AttachRequest(commit=step_pb2.StepCommit()).SerializeToString())
    assert frame.message.HasField("commit")
    assert frame.payload.size == 0
    assert read_frame(pb.AttachRequest, b"").message == pb.AttachRequest()


def test_the_payload_is_a_view_of_what_was_received() -> None:
    buffer = FrameBuffer(pb.AttachRequest(), 4096)
    buffer.payload(np.uint8)[:] = 7
    payload = read_frame(pb.AttachRequest, buffer.data).payload
    assert np.shares_memory(payload, np.frombuffer(buffer.data, np.uint8))
    assert not payload.flags.writeable


def test_a_small_payload_does_not_keep_a_large_message_alive() -> None:
    """A chunk is kept until its step's commit and reserved for by its own size, whatever padding came with it."""
    data = pb.AttachRequest(padding=bytes(1 << 20), payload=b"abcd").SerializeToString()
    payload = read_frame(pb.AttachRequest, data).payload
    assert payload.tobytes() == b"abcd"
    assert not np.shares_memory(payload, np.frombuffer(data, np.uint8))


SAMPLE = pb.AttachRequest(
    open=pb.AttachOpen(session_id="0123456789abcdef"),
    chunk=tensor_pb2.Chunk(offset=300, count=9),
    padding=b"pad",
    payload=b"0123456789" * 20,
).SerializeToString()


def whole_fields(data: bytes) -> set[int]:
    """Lengths at which a message may be cut without harm: between its top-level fields."""
    cuts, position = {0}, 0
    while position < len(data):
        assert data[position] & 7 == 2, "the sample has only length-delimited fields"
        length, start = data[position + 1], position + 2
        if length & 0x80:
            length, start = length & 0x7F | data[position + 2] << 7, position + 3
        position = start + length
        cuts.add(position)
    return cuts


@pytest.mark.parametrize("length", sorted(set(range(len(SAMPLE))) - whole_fields(SAMPLE)))
def test_a_message_cut_inside_a_field_is_refused(length: int) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_frame(pb.AttachRequest, SAMPLE[:length])
    assert refused.value.reason is Reason.INVALID_FRAME
    assert str(refused.value).startswith(f"message of {length} bytes cannot be decoded: ")


@given(st.binary(max_size=200) | st.tuples(st.integers(0, len(SAMPLE)), st.binary(min_size=1, max_size=8)))
@settings(max_examples=500)
def test_garbage_is_refused_as_an_invalid_frame_or_read(garbage: bytes | tuple[int, bytes]) -> None:
    """Random bytes, and a good message with a few bytes replaced: no other error ever comes out."""
    if isinstance(garbage, tuple):
        at, replacement = garbage
        garbage = SAMPLE[:at] + replacement + SAMPLE[at + len(replacement) :]
    try:
        frame = read_frame(pb.AttachRequest, garbage)
    except InvalidRequestError as error:
        assert error.reason is Reason.INVALID_FRAME
    else:
        assert frame.payload.size <= len(garbage)


@pytest.mark.parametrize(
    "data",
    [
        PAYLOAD_TAG + b"\x80" * 10,
        PAYLOAD_TAG + varint(2**63) + b"x",
        PAYLOAD_TAG + varint(2**64 - 1),
        PAYLOAD_TAG,
        b"\x0f",
        b"\x0e",
        b"\x02\x00",
        length_delimited(1, b"\x0a\x01\xff"),
    ],
    ids=["endless varint", "length 2^63", "length 2^64-1", "no length", "type 7", "type 6", "field 0", "bad UTF-8"],
)
def test_known_kinds_of_garbage_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_frame(pb.AttachRequest, data)
    assert refused.value.reason is Reason.INVALID_FRAME
