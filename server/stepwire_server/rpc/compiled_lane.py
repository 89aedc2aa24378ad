"""The compiled lane of one packet lane: Python waits for the datagrams that are not of the common case.

After some steps alike, the session grants the next ones to a loop without an interpreter, which has the socket
meanwhile. The thread of the stream sleeps in the kernel. The end of the grant wakes it, with the datagram that the loop
did not expect, if there is one. That goes the way of every datagram, as if Python had received it.
"""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import numpy as np
import structlog

from stepwire.wire.dtypes import wire_bytes
from stepwire.wire.packets import REQUEST_BYTES
from stepwire_server.engines.cpu import lane_words as word
from stepwire_server.engines.cpu.lane_loop import LaneLoop, Seat
from stepwire_server.engines.protocol import HostArray
from stepwire_server.records.replied import Replied
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.rpc.attach import StepStream
from stepwire_server.rpc.lane_messages import encode_varint, expected_step, lane_reply
from stepwire_server.rpc.serving import Serving
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.workers import Holder
from stepwire_server.sharing.packet_lane import PacketLane
from stepwire_server.sharing.shared_step import StreamMemory

__all__ = ["CompiledLane", "LaneParts", "compiled_lane"]

_log = structlog.get_logger()

_ALIGNMENT: Final = 64


class LaneParts(NamedTuple):
    """The parts of a stream that its compiled lane uses.

    Attributes:
        lane: the packet lane.
        session: the session.
        holder: the hold of the stream.
        stream: the stream.
        serving: the parts of the server.
        memory: the memory that the stream shares; None for none.
    """

    lane: PacketLane
    session: Session
    holder: Holder
    stream: ClientStream
    serving: Serving
    memory: StreamMemory | None


def compiled_lane(parts: LaneParts, packets: StepStream) -> CompiledLane | None:
    """Return the compiled lane of a stream; None where each step has to be looked at by Python.

    That is so where access is controlled, which each step is checked for, and where a test has a clock of its own.
    """
    serving = parts.serving
    unwatched = not serving.access.controls and serving.clock is time.monotonic
    return CompiledLane(parts, packets) if unwatched and parts.session.lane_steps.possible else None


class CompiledLane:
    """The lane of one stream; a `SteppedLane`. One thread notes, receives and closes."""

    def __init__(self, parts: LaneParts, packets: StepStream) -> None:
        """Begin without a grant; `packets` makes the other steps on the lane."""
        self._parts = parts
        self._packets = packets
        self._gate = parts.serving.lanes
        self._seat: Seat | None = None
        self._loop: LaneLoop | None = None
        self._alike, self._needed = 0, self._gate.first_look
        self._settings = b""
        self._datagram = b""
        self._received: HostArray = np.empty(0, np.uint8)
        self._reply: HostArray = np.empty(0, np.uint8)
        self._kept: list[HostArray] = []
        self.send_seconds = 0.0

    def note(self, datagram: bytes) -> None:
        """Note a step that Python has made of one datagram, and replied to."""
        alike = self._packets.last_settings is self._settings
        self._alike = self._alike + 1 if alike else 1
        if not alike:
            self._needed = min(self._needed, self._gate.after_steps)
        self._settings, self._datagram = self._packets.last_settings, datagram

    def receive(self) -> bytes:
        """Wait for a datagram that Python has to see, as `PacketLane.receive` does."""
        lane = self._parts.lane
        if self._alike < self._needed or not self._gate.is_open:
            return lane.receive()
        self.send_seconds = self._packets.last_send_seconds or 0.0
        if (seat := self._granted()) is None:
            awaits = self._parts.session.lane_steps.awaits_loop and self.may_compile
            self._needed = self._alike + (self._gate.first_look if awaits else min(self._alike, self._gate.after_steps))
            return lane.receive()
        seat.wait()
        self._alike = 0
        self._gate.over(seat)
        self._parts.session.lane_steps.settle()
        self._needed, self._packets.last_send_seconds = self._gate.steps_alike, self.send_seconds
        if seat.row[word.UNSENT]:
            lane.send(self._reply.tobytes())
        elif (count := int(seat.row[word.COUNT])) != word.NOT_RECEIVED:
            return self._received[:count].tobytes()
        return lane.receive()

    def close(self) -> None:
        """Give the place in the loop back. No grant is left: the thread that closes would wait for its end."""
        if self._seat is not None:
            self._seat.leave()
            self._seat = None

    def _granted(self) -> Seat | None:
        """Have the next steps granted, and return the place of the lane; None for none."""
        request = self._packets.last_request
        try:
            if request is None or not self._parts.session.lane_steps.grant(self._parts.holder, request, self):
                return None
        except OSError as problem:  # no descriptors: steps go their ordinary way
            _log.warning("no compiled lane", problem=str(problem))
            return None
        return self._seat

    @property
    def may_compile(self) -> bool:
        """See `SteppedLane`."""
        return self._alike >= self._gate.after_steps

    def seat(self, loop: LaneLoop) -> Seat | None:
        """See `SteppedLane`."""
        if self._loop is not loop:
            self.close()
        if self._seat is None:
            self._loop, self._seat = loop, self._parts.lane.seated(loop)
        if (seat := self._seat) is not None:
            self._parts.stream.seen_in_lane = lambda: seat.seen
        return seat

    def lay_out(self, seat: Seat, first: StepResult) -> bool:
        """See `SteppedLane`."""
        request, layout, memory = self._packets.last_request, self._parts.session.config.layout, self._parts.memory
        expected = expected_step(self._datagram)
        assert request is not None
        reply_bytes = layout.size * request.reply_dtype.itemsize if request.reply and not request.shared else 0
        gradient_bytes = 0 if request.shared else wire_bytes(request.gradient_dtype, layout.size)
        number = encode_varint(first.step)
        if expected is None or expected.payload_bytes != gradient_bytes or len(number) != _length(expected.step):
            return False
        head = np.frombuffer(bytearray(expected.head), np.uint8)
        head[slice(*expected.step)] = list(number)
        reply = lane_reply(first, layout.size, reply_bytes)
        self._received = _aligned(REQUEST_BYTES + 1, len(head))
        self._reply = _aligned(len(reply.head) + reply_bytes, len(reply.head))
        self._reply[: len(reply.head)] = list(reply.head)
        own = [(self._reply.ctypes.data + start, end - start) for start, end in reply.counters]
        counters = np.array([(head.ctypes.data + expected.step[0], len(number)), *own], np.int64)
        doubles = np.array(reply.doubles, np.int64)
        row, shared = seat.row, memory if request.shared else None
        gradient = self._received[len(head) :] if shared is None else shared.gradient
        out = self._reply[len(reply.head) :] if shared is None else shared.parameters
        places = {
            word.EXPECTED: head,
            word.RECEIVED: self._received,
            word.REPLY: self._reply,
            word.COUNTERS: counters,
            word.DOUBLES: doubles,
            word.GRADIENT: gradient,
            word.OUT: out,
        }
        self._kept = list(places.values())
        for place, array in places.items():
            row[place] = array.ctypes.data
        row[word.HEAD], row[word.LENGTH], row[word.CAPACITY] = len(head), len(self._datagram), len(self._received)
        row[word.REPLY_LENGTH] = len(self._reply)
        row[word.COUNTER_COUNT], row[word.DOUBLE_COUNT] = len(counters), len(doubles)
        return True

    def open(self, seat: Seat) -> bool:
        """See `SteppedLane`."""
        return self._gate.grant(seat)

    def settled(self, request: StepRequest, result: StepResult, record: HostArray) -> None:
        """See `SteppedLane`."""
        stream, session = self._parts.stream, self._parts.session
        began, self.send_seconds = float(record[word.BEGAN]), float(record[word.SEND])
        stream.last_seen = max(stream.last_seen, began)
        self._gate.count()
        if not self._parts.serving.reply_sinks:
            return
        size, sent_bytes = session.config.layout.size, len(self._reply)
        if request.shared and request.reply:
            sent_bytes += size * request.reply_dtype.itemsize
        received_bytes = size * request.gradient_dtype.itemsize
        seconds = result.times.apply + self.send_seconds
        encodings = (request.gradient_dtype, request.reply_dtype)
        for sink in self._parts.serving.reply_sinks:
            sink(
                Replied(
                    stream.transport,
                    result,
                    *encodings,
                    received_bytes,
                    sent_bytes,
                    0.0,
                    self.send_seconds,
                    seconds,
                    session.session_id,
                )
            )


def _length(part: tuple[int, int]) -> int:
    return part[1] - part[0]


def _aligned(size: int, head: int) -> HostArray:
    """Return room for a message whose payload, behind the head, is aligned."""
    room: HostArray = np.zeros(size + _ALIGNMENT, np.uint8)  # padding between two groups stays zero
    start = -(int(room.ctypes.data) + head) % _ALIGNMENT
    return room[start : start + size]
