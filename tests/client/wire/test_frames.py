"""Bulk messages, compared with the protobuf library for every message that it makes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwire.errors import InvalidRequestError, Reason
from stepwire.v1 import attach_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.frames import FrameBuffer, read_frame, whole_message

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
        message.open.CopyFrom(attach_pb2.AttachOpen(session_id=draw(st.text(max_size=40)), attach_token=draw(UINT64)))
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


# Messages up to 32 KiB are left to the protobuf library; these make the others.
FILLERS = st.sampled_from([b"", b"", length_delimited(15, bytes(40_000)), length_delimited(14, bytes(40_000))])


@st.composite
def wire_messages(draw: st.DrawFn) -> bytes:
    """A valid AttachRequest whose fields come in any order, repeated, and among unknown ones."""
    pieces = [message.SerializeToString() for message in draw(st.lists(headers(), max_size=3))]
    pieces += [length_delimited(15, body) for body in draw(st.lists(st.binary(max_size=300), max_size=3))]
    pieces += [*draw(st.lists(UNKNOWN_FIELDS, max_size=4)), draw(FILLERS)]
    return b"".join(draw(st.permutations(pieces)))


@given(wire_messages())
@settings(max_examples=300)
def test_reading_agrees_with_protobuf(data: bytes) -> None:
    """Fields in any order; of two payloads the last counts, as in protobuf."""
    expected = pb.AttachRequest.FromString(data)
    frame = read_frame(pb.AttachRequest, data)
    assert frame.payload.tobytes() == expected.payload
    expected.ClearField("payload")
    frame.message.ClearField("payload")
    assert frame.message.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def written(header: Any, values: np.ndarray) -> bytes:
    """Build a message through a frame buffer."""
    frame = FrameBuffer(header, values.nbytes)
    frame.payload(values.dtype)[:] = values
    return frame.finish()


@given(headers(), st.binary(max_size=300), st.sampled_from([1, 200]))
def test_protobuf_reads_what_a_frame_buffer_writes(header: pb.AttachRequest, payload: bytes, times: int) -> None:
    header.ClearField("padding")
    expected, payload = pb.AttachRequest(), payload * times
    expected.CopyFrom(header)
    read = pb.AttachRequest.FromString(written(header, np.frombuffer(payload, np.uint8)))
    assert read.payload == payload
    read.ClearField("payload")
    read.ClearField("padding")
    assert read == expected


@pytest.mark.parametrize("elements", [16, 16_384])
@pytest.mark.parametrize("id_length", range(20))
def test_payloads_are_aligned_where_they_are_written_and_read(id_length: int, elements: int) -> None:
    """To 16 bytes with any length of the header, so that kernels read whole vectors out of received messages."""
    header = pb.AttachRequest(open=attach_pb2.AttachOpen(session_id="x" * id_length))
    frame = FrameBuffer(header, 4 * elements)
    values = frame.payload(np.float32)
    values[:] = np.arange(elements)
    read = read_frame(pb.AttachRequest, frame.finish()).payload
    assert values.__array_interface__["data"][0] % 16 == 0
    assert read.__array_interface__["data"][0] % 16 == 0
    assert read.view(np.float32).tolist() == list(range(elements))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("repetitions", [1, 10_000])
def test_a_payload_is_written_in_any_wire_dtype(dtype: Any, repetitions: int) -> None:
    values = np.array([1.5, -2.0, 0.0, 96.0] * repetitions, dtype)
    read = read_frame(pb.PullResponse, written(pb.PullResponse(slot="param"), values))
    assert read.message.slot == "param"
    assert read.payload.view(dtype).tobytes() == values.tobytes()


def test_a_large_payload_is_written_into_the_message_itself() -> None:
    frame = FrameBuffer(pb.PullResponse(), 1 << 20)
    payload = frame.payload(np.uint8)
    payload[:] = 3
    assert np.shares_memory(payload, np.frombuffer(frame.finish(), np.uint8))


@pytest.mark.parametrize("count", [0, 1, 1000, 8192, 8193, 100_000])
def test_a_payload_that_is_there_travels_like_one_that_is_written(count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    header = pb.AttachRequest(chunk=tensor_pb2.Chunk(offset=3, count=count))
    frame = FrameBuffer(header, values.nbytes)
    frame.payload(np.float32)[:] = values
    message = whole_message(header, values)
    assert message == frame.finish()
    parsed = pb.AttachRequest.FromString(message)
    assert (parsed.chunk, parsed.payload) == (header.chunk, values.tobytes())
    assert not header.payload, "the header is left as it was"


def test_a_message_without_payload_has_an_empty_one() -> None:
    frame = read_frame(pb.AttachRequest, pb.AttachRequest(commit=step_pb2.StepCommit()).SerializeToString())
    assert frame.message.HasField("commit")
    assert frame.payload.size == 0
    assert read_frame(pb.AttachRequest, b"").message == pb.AttachRequest()


def test_a_large_payload_is_a_view_of_what_was_received() -> None:
    data = written(pb.AttachRequest(), np.full(1 << 20, 7, np.uint8))
    payload = read_frame(pb.AttachRequest, data).payload
    assert np.shares_memory(payload, np.frombuffer(data, np.uint8))
    assert not payload.flags.writeable


@pytest.mark.parametrize("padding", [100, 1 << 20])
def test_a_small_payload_does_not_keep_a_large_message_alive(padding: int) -> None:
    """A chunk is kept until its step's commit; its reservation is its own size, without the padding of its message."""
    data = pb.AttachRequest(padding=bytes(padding), payload=b"abcd").SerializeToString()
    payload = read_frame(pb.AttachRequest, data).payload
    assert payload.tobytes() == b"abcd"
    assert not np.shares_memory(payload, np.frombuffer(data, np.uint8))


SAMPLE = pb.AttachRequest(
    open=attach_pb2.AttachOpen(session_id="0123456789abcdef"),
    chunk=tensor_pb2.Chunk(offset=300, count=9),
    padding=b"pad",
    payload=b"0123456789" * 20,
).SerializeToString()
LARGE_SAMPLE = SAMPLE + length_delimited(15, bytes(40_000))


def whole_fields(data: bytes) -> set[int]:
    """Lengths at which a message may be cut without harm: between its top-level fields."""
    cuts, position = {0}, 0
    while position < len(data):
        assert data[position] & 7 == 2, "the sample has only length-delimited fields"
        length, shift, position = 0, 0, position + 1
        while data[position] & 0x80:
            length, shift, position = length | (data[position] & 0x7F) << shift, shift + 7, position + 1
        position += 1 + (length | data[position] << shift)
        cuts.add(position)
    return cuts


@pytest.mark.parametrize("sample", [SAMPLE, LARGE_SAMPLE], ids=["small", "large"])
def test_a_message_cut_inside_a_field_is_refused(sample: bytes) -> None:
    lengths = {*range(len(SAMPLE)), *range(len(sample) - 3, len(sample))} - whole_fields(sample)
    for length in sorted(lengths):
        with pytest.raises(InvalidRequestError) as refused:
            read_frame(pb.AttachRequest, sample[:length])
        assert refused.value.reason is Reason.INVALID_FRAME
        assert str(refused.value).startswith(f"message of {length} bytes cannot be decoded: ")


@given(st.binary(max_size=200) | st.tuples(st.integers(0, len(SAMPLE)), st.binary(min_size=1, max_size=8)))
@settings(max_examples=500)
def test_garbage_is_refused_as_an_invalid_frame_or_read(garbage: bytes | tuple[int, bytes]) -> None:
    """Random bytes, and a good message with a few bytes replaced: no other error ever comes out."""
    if isinstance(garbage, tuple):
        at, replacement = garbage
        garbage = SAMPLE[:at] + replacement + SAMPLE[at + len(replacement) :]
    for data in (garbage, length_delimited(14, bytes(40_000)) + garbage):
        try:
            frame = read_frame(pb.AttachRequest, data)
        except InvalidRequestError as error:
            assert error.reason is Reason.INVALID_FRAME
        else:
            assert frame.payload.size <= len(data)


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
@pytest.mark.parametrize("before", [b"", length_delimited(14, bytes(40_000))], ids=["small", "large"])
def test_known_kinds_of_garbage_are_refused(before: bytes, data: bytes) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        read_frame(pb.AttachRequest, before + data)
    assert refused.value.reason is Reason.INVALID_FRAME
