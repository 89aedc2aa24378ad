"""Packet lanes, from a client in raw messages: steps on the lane and beside it, and datagrams that nobody should send.

`make attack-test` sends 100,000 hostile datagrams.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2, tensor_pb2, transport_pb2
from stepwire.wire.packets import PAYLOAD_BYTES, REQUEST_BYTES
from tests.support.raw_handoff import Handed, fetch, held_by_process

PACKETS, GRPC = transport_pb2.TRANSPORT_PACKETS, transport_pb2.TRANSPORT_GRPC
PATIENCE_SECONDS = 120.0
ROUNDS = int(os.environ.get("STEPWIRE_HOSTILE_PACKETS", "40"))


class LaneStream:
    """An attached stream with its lane, and the memory beside it. A context manager."""

    def __init__(self, live: Any) -> None:
        self.live = live
        self.stream = live.wire.open()
        self.stream.send(live.opening(transport=PACKETS))
        self.opened = pb.AttachResponse.FromString(self.stream.receive()).opened
        live.token = self.opened.attach_token
        self.handed: Handed = fetch(
            self.opened.handoff.socket, transport_pb2.HandoffRequest(token=self.opened.handoff.token)
        )
        self.lane = socket.socket(fileno=self.handed.descriptors.pop())
        self.lane.settimeout(PATIENCE_SECONDS)

    def exchange(self, message: pb.AttachRequest) -> pb.AttachResponse:
        self.lane.send(message.SerializeToString())
        return pb.AttachResponse.FromString(self.lane.recv(1 << 18))

    def over_stream(self, message: pb.AttachRequest) -> pb.AttachResponse:
        self.lane.send(pb.AttachRequest(over_stream=True).SerializeToString())
        self.stream.send(message)
        return pb.AttachResponse.FromString(self.stream.receive())

    def has_ended(self) -> bool:
        try:
            return self.lane.recv(1) == b""
        except ConnectionResetError:  # messages of this client are unread
            return True

    def in_memory(self, step: int) -> pb.AttachRequest:
        """Write a gradient to the shared memory, and return the message of its step."""
        os.pwrite(self.handed.descriptors[0], self.live.gradient(step).tobytes(), 0)
        begin = step_pb2.StepBegin(step=step, in_shared_memory=True)
        return pb.AttachRequest(begin=begin, commit=step_pb2.StepCommit())

    def parameters(self) -> bytes:
        return os.pread(self.handed.descriptors[1], 4 * self.live.size, 0)

    def __enter__(self) -> LaneStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.lane.close()
        self.handed.close()
        self.stream.cancel()


def in_a_packet(live: Any, step: int) -> pb.AttachRequest:
    message: pb.AttachRequest = live.frame(begin=step, commit=True, payload=live.gradient(step))
    return message


def test_steps_in_memory_in_packets_and_over_the_stream_alternate(
    live: Any, wire: Any, make_live: Any, server: Any
) -> None:
    config = live.wire.get(live.id).config
    config.ClearField("device")
    twin = make_live(wire, wire.create(config))
    twin.load(twin.load_opening(1), twin.load_chunk(commit=True))
    twin.step(1)
    with LaneStream(live) as lane:
        assert (lane.opened.transport, lane.opened.transport_reason) == (PACKETS, "")
        assert [each.transport for each in server.registry.streams if each.in_step is False] == ["packets"]
        for step in range(2, 14):
            expected = twin.attach(in_a_packet(twin, step))[-1]
            if step % 3 == 0:
                reply = lane.exchange(lane.in_memory(step))
                assert not reply.payload
            elif step % 3 == 1:
                reply = lane.exchange(in_a_packet(live, step))
                assert reply.payload == expected.payload
            else:
                reply = lane.over_stream(in_a_packet(live, step))
                assert reply.payload == expected.payload
            assert (reply.result.step, reply.result.telemetry.grad_norm) == (step, expected.result.telemetry.grad_norm)
            assert lane.parameters() == expected.payload
    slots = ("param", "exp_avg", "exp_avg_sq")
    assert live.wire.pull(live.id, *slots) == twin.wire.pull(twin.id, *slots)


def hostile(live: Any) -> Iterator[tuple[bytes, str]]:
    """Yield datagrams that end a lane, each with the field that the refusal names."""
    begin = step_pb2.StepBegin(step=2)
    large = pb.AttachRequest(begin=begin, payload=bytes(PAYLOAD_BYTES + 1))
    yield bytes(range(1, 200)), ""
    yield in_a_packet(live, 2).SerializeToString()[:-3], ""
    yield bytes(REQUEST_BYTES + 1), "payload"
    yield bytes(4 * REQUEST_BYTES), "payload"
    yield large.SerializeToString(), "payload"
    yield live.opening().SerializeToString(), "begin"
    yield pb.AttachRequest(commit=step_pb2.StepCommit()).SerializeToString(), "begin"
    yield pb.AttachRequest(over_stream=True, begin=begin).SerializeToString(), "begin"
    yield pb.AttachRequest(over_stream=True, payload=b"x").SerializeToString(), "payload"
    shared = step_pb2.StepBegin(step=2, in_shared_memory=True)
    yield pb.AttachRequest(begin=shared, chunk=tensor_pb2.Chunk(count=1), payload=b"1234").SerializeToString(), "chunk"
    yield pb.AttachRequest(check={"pattern": bytes(15)}).SerializeToString(), "check.pattern"


def test_hostile_packets_end_the_lane_with_a_reason_and_leave_nothing(live: Any, untouched: Any, until: Any) -> None:
    packets = list(hostile(live))
    with LaneStream(live):
        pass  # the parameters lie in shared memory from now on
    until(lambda: not live.wire.get(live.id).attached)
    held, reserved = held_by_process(), live.wire.reserved_bytes()
    for packet, field in packets:
        with LaneStream(live) as lane:
            lane.lane.send(packet)
            assert lane.has_ended()
            untouched(lane.stream.receive, "INVALID_ARGUMENT", "INVALID_FRAME", field=field or None)
        until(lambda: not live.wire.get(live.id).attached)
    assert live.wire.reserved_bytes() == reserved
    until(lambda: held_by_process() <= held)


def drawn_packet(generator: np.random.Generator) -> bytes:
    """Draw a packet that ends a lane: one in some 25,000 announces a step over the stream, which the server awaits."""
    while True:
        packet = generator.bytes(int(generator.integers(1, 300)))
        with contextlib.suppress(DecodeError):
            if pb.AttachRequest.FromString(packet).over_stream:
                continue
        return packet


def test_many_hostile_packets_leave_nothing(live: Any, untouched: Any, until: Any) -> None:
    generator = np.random.default_rng(5)
    with LaneStream(live):
        pass
    until(lambda: not live.wire.get(live.id).attached)
    held, sent = held_by_process(), 0
    while sent < ROUNDS:
        with LaneStream(live) as lane:
            for _ in range(8):
                try:
                    lane.lane.send(drawn_packet(generator))
                except OSError:  # the first one has ended the lane
                    break
                sent += 1
            assert lane.has_ended()
        until(lambda: not live.wire.get(live.id).attached)
    until(lambda: held_by_process() <= held)


def test_descriptors_that_come_with_a_packet_are_closed(live: Any) -> None:
    with LaneStream(live) as lane:
        lane.exchange(in_a_packet(live, 2))  # with the first message the server lets go of the client's end
        held = held_by_process()
        for step in range(3, 12):
            message = in_a_packet(live, step).SerializeToString()
            socket.send_fds(lane.lane, [message], [lane.lane.fileno()] * 8)
            assert pb.AttachResponse.FromString(lane.lane.recv(1 << 18)).result.step == step
        assert held_by_process() == held


def test_a_client_that_closes_its_lane_ends_its_stream_as_ever(live: Any, until: Any) -> None:
    lane = LaneStream(live)
    assert lane.exchange(in_a_packet(live, 2)).result.step == 2
    lane.lane.close()
    assert live.wire.get(live.id).attached
    lane.stream.finish()
    with pytest.raises(StopIteration):
        lane.stream.receive()
    lane.handed.close()


def test_a_message_over_the_stream_after_the_end_of_the_lane_is_refused(live: Any, refusal: Any) -> None:
    with LaneStream(live) as lane:
        lane.exchange(in_a_packet(live, 2))
        lane.lane.send(b"")  # which is the end
        lane.stream.send(in_a_packet(live, 3))
        refusal(lane.stream.receive, "INVALID_ARGUMENT", "INVALID_FRAME", "has ended", field="over_stream")


@pytest.mark.parametrize("over_stream", [True, False])
def test_what_belongs_on_a_lane_is_refused_elsewhere(live: Any, refusal: Any, over_stream: bool) -> None:
    message = in_a_packet(live, 2)
    message.over_stream = True
    if over_stream:
        with LaneStream(live) as lane:
            refusal(lambda: lane.over_stream(message), "INVALID_ARGUMENT", "INVALID_FRAME", field="over_stream")
    else:
        refusal(lambda: live.attach(message), "INVALID_ARGUMENT", "INVALID_FRAME", field="over_stream")


def test_a_client_that_reads_no_replies_is_cancelled_like_any_silent_one(
    serve: Any, connect: Any, make_config: Any, make_live: Any, clock: Any, until: Any
) -> None:
    with serve(shared_memory=False) as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((PAYLOAD_BYTES // 4,))))
        live.load(live.load_opening(1), live.load_chunk(commit=True))
        live.step(1)
        with LaneStream(live) as lane:
            assert lane.opened.transport_reason.startswith("shared memory is switched off")
            assert lane.handed.descriptors == []
            replay = pb.AttachRequest(begin=step_pb2.StepBegin(step=1), commit=step_pb2.StepCommit())
            for _ in range(40):
                lane.lane.send(replay.SerializeToString())
            (stream,) = server.registry.streams
            until(lambda: stream.in_step)
            clock.now += 1e6
            server.registry.sweep()
            until(lambda: not len(server.registry.streams))


def test_large_steps_without_memory_get_no_lane(serve: Any, connect: Any, make_config: Any, make_live: Any) -> None:
    with serve(shared_memory=False) as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((PAYLOAD_BYTES // 4 + 1,))))
        stream = wire.open()
        stream.send(live.opening(transport=PACKETS))
        opened = pb.AttachResponse.FromString(stream.receive()).opened
        assert (opened.transport, opened.HasField("handoff")) == (GRPC, False)
        assert opened.transport_reason == (
            "shared memory is switched off on this server (--no-shared-memory); the steps are too large for packets"
        )
        stream.cancel()
