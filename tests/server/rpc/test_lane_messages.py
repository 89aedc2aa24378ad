"""The messages that a compiled lane expects and fills: the contract's own, whatever Python would have written."""

from __future__ import annotations

import struct

import pytest

import stepwire
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2, tensor_pb2
from stepwire_server.engines.cpu import lane_words as word
from stepwire_server.records.step_result import GroupResult, StepResult, StepTimes
from stepwire_server.rpc.lane_messages import encode_varint, expected_step, lane_reply


def step_message(step: int = 300, payload: bytes = b"12345678", **begin: object) -> pb.AttachRequest:
    opening = step_pb2.StepBegin(step=step, epoch=7, **begin)  # type: ignore[arg-type]
    chunk = tensor_pb2.Chunk(count=2)
    return pb.AttachRequest(begin=opening, chunk=chunk, commit=step_pb2.StepCommit(), payload=payload)


@pytest.mark.parametrize("step", [1, 127, 128, 300, 1 << 40])
def test_the_number_and_the_payload_of_a_step_are_found(step: int) -> None:
    data = step_message(step, load=3).SerializeToString()
    expected = expected_step(data)
    assert expected is not None
    assert data == expected.head + b"12345678"
    assert expected.payload_bytes == 8
    assert expected.head[slice(*expected.step)] == encode_varint(step)


def test_a_step_without_a_payload_is_a_head_alone() -> None:
    data = pb.AttachRequest(begin=step_pb2.StepBegin(step=2, in_shared_memory=True)).SerializeToString()
    expected = expected_step(data)
    assert expected is not None
    assert (expected.head, expected.payload_bytes) == (data, 0)


def test_messages_of_another_form_are_not_expected() -> None:
    data = step_message().SerializeToString()
    payload = pb.AttachRequest(payload=b"12345678").SerializeToString()
    assert expected_step(payload + data.removesuffix(payload)) is None, "the payload is not the last"
    assert expected_step(data + payload) is None, "the payload came twice"
    begin = pb.AttachRequest(begin=step_pb2.StepBegin(step=4)).SerializeToString()
    assert expected_step(begin + data) is None, "the number came twice"
    assert expected_step(pb.AttachRequest(over_stream=True).SerializeToString()) is None
    assert expected_step(payload) is None


def result(groups: int, *, moved: float | None) -> StepResult:
    one = GroupResult(1.0, stepwire.Adam(lr=0.5).hyperparameters(), 5, 1.0, 1.0, moved, moved)
    return StepResult(
        step=9,
        epoch=7,
        skipped=False,
        grad_norm=1.0,
        non_finite_count=0,
        groups=(one,) * groups,
        times=StepTimes(1.0, 1.0, 1.0),
        clipped_grad_norm=1.0,
        update_norm=moved,
        param_norm=moved,
    )


@pytest.mark.parametrize(("groups", "moved"), [(1, 1.0), (1, None), (3, None)])
def test_every_double_and_counter_of_a_reply_has_its_place(groups: int, moved: float | None) -> None:
    reply = lane_reply(result(groups, moved=moved), 2, 8)
    body = bytearray(reply.head)
    for column, place in reply.doubles:
        body[place : place + 8] = struct.pack("<d", 100.0 + column)
    for start, end in reply.counters:
        body[start:end] = bytes([body[start] + 1])
    read = pb.AttachResponse.FromString(bytes(body) + b"abcdefgh")
    told = read.result.telemetry
    assert (read.result.step, read.chunk.count, read.payload) == (10, 2, b"abcdefgh")
    names = {
        "grad_norm": word.NORM,
        "clipped_grad_norm": word.CLIPPED_NORM,
        "clip_coefficient": word.COEFFICIENT,
        "receive_seconds": word.RECEIVE,
        "queue_seconds": word.QUEUE,
        "apply_seconds": word.APPLY,
        "previous_send_seconds": word.PREVIOUS_SEND,
    }
    if moved is not None:
        names |= {"update_norm": word.UPDATE_NORM, "param_norm": word.PARAM_NORM}
    assert {name: getattr(told, name) for name in names} == {name: 100.0 + column for name, column in names.items()}
    assert told.HasField("update_norm") == (moved is not None)
    for index, group in enumerate(told.groups):
        first = 100.0 + word.COLUMNS + index * word.GROUP_COLUMNS
        found = (group.grad_norm, group.clipped_grad_norm, group.clip_coefficient, group.hyperparameters.lr, group.t)
        assert found == (first, first + 1, first + 2, first + 3, 6)
        assert group.HasField("update_norm") == (moved is not None)


def test_a_reply_without_parameters_has_no_payload() -> None:
    reply = lane_reply(result(1, moved=1.0), 2, 0)
    assert not pb.AttachResponse.FromString(reply.head).HasField("chunk")
