"""The messages of a compiled lane: all bytes of steps to come are known, but for numbers that count up, and doubles.

Python writes the first reply as it writes any, and finds the places of its numbers by the contract's field numbers. A
lane fills those places and leaves the rest. So no field is encoded in a second place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from stepwire.v1 import optimizer_pb2, step_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.engines.cpu import lane_words as word
from stepwire_server.records.step_result import StepResult
from stepwire_server.rpc.encode import encode_result

__all__ = ["ExpectedStep", "LaneReply", "encode_varint", "expected_step", "lane_reply"]

_PAYLOAD: Final = pb.AttachRequest.PAYLOAD_FIELD_NUMBER
_BEGIN: Final = pb.AttachRequest.BEGIN_FIELD_NUMBER
_OF_A_STEP: Final = {
    _BEGIN,
    pb.AttachRequest.CHUNK_FIELD_NUMBER,
    pb.AttachRequest.COMMIT_FIELD_NUMBER,
    pb.AttachRequest.PADDING_FIELD_NUMBER,
    _PAYLOAD,
}
_VARINT, _DOUBLE, _BYTES = 0, 1, 2

_TELEMETRY: Final = {
    step_pb2.Telemetry.GRAD_NORM_FIELD_NUMBER: word.NORM,
    step_pb2.Telemetry.CLIPPED_GRAD_NORM_FIELD_NUMBER: word.CLIPPED_NORM,
    step_pb2.Telemetry.CLIP_COEFFICIENT_FIELD_NUMBER: word.COEFFICIENT,
    step_pb2.Telemetry.UPDATE_NORM_FIELD_NUMBER: word.UPDATE_NORM,
    step_pb2.Telemetry.PARAM_NORM_FIELD_NUMBER: word.PARAM_NORM,
    step_pb2.Telemetry.RECEIVE_SECONDS_FIELD_NUMBER: word.RECEIVE,
    step_pb2.Telemetry.QUEUE_SECONDS_FIELD_NUMBER: word.QUEUE,
    step_pb2.Telemetry.APPLY_SECONDS_FIELD_NUMBER: word.APPLY,
    step_pb2.Telemetry.PREVIOUS_SEND_SECONDS_FIELD_NUMBER: word.PREVIOUS_SEND,
}
_GROUP: Final = {
    step_pb2.GroupTelemetry.GRAD_NORM_FIELD_NUMBER: word.COLUMNS + word.GROUP_NORM,
    step_pb2.GroupTelemetry.CLIPPED_GRAD_NORM_FIELD_NUMBER: word.COLUMNS + word.GROUP_CLIPPED,
    step_pb2.GroupTelemetry.CLIP_COEFFICIENT_FIELD_NUMBER: word.COLUMNS + word.GROUP_COEFFICIENT,
}
_GROUP_MOVED: Final = {
    step_pb2.GroupTelemetry.UPDATE_NORM_FIELD_NUMBER: word.UPDATE_NORM,
    step_pb2.GroupTelemetry.PARAM_NORM_FIELD_NUMBER: word.PARAM_NORM,
}
"""The columns of a record, by the fields of telemetry that have them."""


class _Field(NamedTuple):
    """A field of a message: its number, its wire type, and where its value begins and ends."""

    number: int
    kind: int
    start: int
    end: int


class ExpectedStep(NamedTuple):
    """A step as a datagram.

    Attributes:
        head: everything before the payload.
        payload_bytes: the bytes of the payload, which comes last.
        step: where the number of the step begins and ends in the head.
    """

    head: bytes
    payload_bytes: int
    step: tuple[int, int]


class LaneReply(NamedTuple):
    """The first reply.

    Attributes:
        head: everything before the payload.
        counters: where numbers begin and end that count up with each step.
        doubles: the column of a record and the place in the head of each double.
    """

    head: bytes
    counters: Sequence[tuple[int, int]]
    doubles: Sequence[tuple[int, int]]


def expected_step(datagram: bytes) -> ExpectedStep | None:
    """Read a step that was made; None where it is not laid out as those to come may be expected."""
    found = {field.number: field for field in _fields(datagram, 0, len(datagram))}
    count = sum(1 for _ in _fields(datagram, 0, len(datagram)))
    if len(found) != count or not found.keys() <= _OF_A_STEP or _BEGIN not in found:
        return None
    steps = [field for field in _fields(datagram, found[_BEGIN].start, found[_BEGIN].end) if field.number == 1]
    payload = found.get(_PAYLOAD)
    start, end = (len(datagram),) * 2 if payload is None else (payload.start, payload.end)
    if len(steps) != 1 or end != len(datagram):
        return None
    return ExpectedStep(datagram[:start], end - start, (steps[0].start, steps[0].end))


def lane_reply(first: StepResult, size: int, payload_bytes: int) -> LaneReply:
    """Write the first reply of a lane.

    Args:
        first: the result of the first step, with 1 in the place of all that is measured.
        size: the elements of the payload.
        payload_bytes: the bytes of the payload; 0 for none.
    """
    message = pb.AttachResponse()
    encode_result(first, 0, message.result)
    telemetry = message.result.telemetry
    telemetry.receive_seconds = telemetry.queue_seconds = telemetry.previous_send_seconds = 1.0
    if payload_bytes:
        message.chunk.count = size
    body = message.SerializeToString()
    counters: list[tuple[int, int]] = []
    doubles: list[tuple[int, int]] = []
    for result in _inside(body, (0, len(body)), pb.AttachResponse.RESULT_FIELD_NUMBER):
        counters += [(field.start, field.end) for field in _fields(body, *result) if field.number == 1]
        for part in _inside(body, result, step_pb2.StepResult.TELEMETRY_FIELD_NUMBER):
            doubles += [
                (_TELEMETRY[field.number], field.start) for field in _fields(body, *part) if field.kind == _DOUBLE
            ]
            for index, group in enumerate(_inside(body, part, step_pb2.Telemetry.GROUPS_FIELD_NUMBER)):
                _find_in_group(body, group, index, counters, doubles)
    return LaneReply(body + _payload_start(payload_bytes), counters, doubles)


def _find_in_group(
    body: bytes,
    group: tuple[int, int],
    index: int,
    counters: list[tuple[int, int]],
    doubles: list[tuple[int, int]],
) -> None:
    shift = word.GROUP_COLUMNS * index
    for field in _fields(body, *group):
        if field.number == step_pb2.GroupTelemetry.T_FIELD_NUMBER:
            counters.append((field.start, field.end))
        elif field.kind == _DOUBLE:
            own = _GROUP.get(field.number)
            doubles.append((_GROUP_MOVED[field.number] if own is None else own + shift, field.start))
    for used in _inside(body, group, step_pb2.GroupTelemetry.HYPERPARAMETERS_FIELD_NUMBER):
        rates = [each for each in _fields(body, *used) if each.number == optimizer_pb2.Hyperparameters.LR_FIELD_NUMBER]
        doubles += [(word.COLUMNS + word.GROUP_RATE + shift, rate.start) for rate in rates]


def _inside(data: bytes, of: tuple[int, int], number: int) -> Iterator[tuple[int, int]]:
    return ((field.start, field.end) for field in _fields(data, *of) if field.number == number)


def _fields(data: bytes, start: int, end: int) -> Iterator[_Field]:
    """Yield the fields of a message that was parsed before, so that it is well formed."""
    while start < end:
        tag, start = _varint(data, start)
        kind = tag & 7
        if kind == _VARINT:
            value, after = start, _varint(data, start)[1]
        elif kind == _BYTES:
            length, value = _varint(data, start)
            after = value + length
        else:
            value, after = start, start + (8 if kind == _DOUBLE else 4)
        yield _Field(tag >> 3, kind, value, after)
        start = after


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return value | data[position] << shift, position + 1


def encode_varint(value: int) -> bytes:
    """Encode a number ≥ 0."""
    digits = []
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def _payload_start(payload_bytes: int) -> bytes:
    return bytes([_PAYLOAD << 3 | _BYTES]) + encode_varint(payload_bytes) if payload_bytes else b""
