"""The steps of a stream whose messages travel on a packet lane: the same steps, by the same code, in the same thread.

The thread of the stream's handler waits on the lane. Whatever ends the stream ends the lane too, and then gRPC's own
messages say how the stream ended. So a stream with a lane ends as any other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Protocol

from stepwire.errors import StepwireError, UnavailableError
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.frames import Frame, read_frame
from stepwire.wire.packets import PAYLOAD_BYTES, REQUEST_BYTES
from stepwire_server.rpc.attach import StepStream, invalid_frame
from stepwire_server.rpc.compiled_lane import CompiledLane
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sharing.packet_lane import PacketLane

__all__ = ["PacketSteps", "end_together"]


class _Call(Protocol):
    """The part of gRPC's context of a call that is needed here."""

    def add_callback(self, callback: Any) -> bool: ...


def end_together(lane: PacketLane, stream: ClientStream, call: _Call) -> None:
    """Have a lane end with its stream, whoever ends the stream."""
    refuse = stream.refuse

    def refuse_both(error: StepwireError) -> None:
        refuse(error)  # before the end of the lane, after which the client asks for the status
        lane.end()

    stream.refuse = refuse_both
    if not call.add_callback(lane.end):
        lane.end()


class PacketSteps:
    """The steps on one lane, and those that come over its stream in between."""

    def __init__(
        self,
        lane: PacketLane,
        stream: ClientStream,
        packets: StepStream,
        messages: StepStream,
        compiled: CompiledLane | None = None,
    ) -> None:
        """Serve steps on a lane.

        Args:
            lane: the lane.
            stream: its stream.
            packets: the steps that come on the lane.
            messages: the steps that come over the stream.
            compiled: makes steps of the common case without the interpreter; None for none.
        """
        self._lane = lane
        self._stream = stream
        self._packets = packets
        self._messages = messages
        self._compiled = compiled

    def replies(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Reply to the steps on the lane, until its end, and yield the replies to those that come over the stream.

        Args:
            messages: gRPC's messages of the stream.

        Raises:
            StepwireError: the first step that is refused; the stream ends with it.
        """
        with contextlib.nullcontext() if self._compiled is None else contextlib.closing(self._compiled):
            yield from self._replies(messages)

    def _replies(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        frames = map(functools.partial(read_frame, pb.AttachRequest), self._stream.received(messages))
        received = _Packets(self._lane, messages, self._stream, self._compiled)
        packets = map(_read_packet, self._stream.received(received))
        for opening in map(lambda packet: [packet], packets):
            if not opening[0].message.over_stream:
                count = received.count
                self._reply(opening, packets)
                if self._compiled is not None and received.count == count:  # a step of one datagram
                    self._compiled.note(received.last)
            elif _is_alone(opening.pop()) and (frame := next(frames, None)) is not None:
                opening.append(frame)
                del frame
                yield from self._messages.step(opening, frames)

    def _reply(self, opening: list[Frame], packets: Iterator[Frame]) -> None:
        for reply in self._packets.step(opening, packets):
            if not self._lane.send(reply):
                return


class _Packets(Iterator[bytes]):
    """The messages on a lane. At its end gRPC's own say whether the client is gone, or has finished.

    Attributes:
        last: the last message.
        count: the number of messages so far.
    """

    def __init__(
        self, lane: PacketLane, messages: Iterator[bytes], stream: ClientStream, compiled: CompiledLane | None
    ) -> None:
        self.last, self.count = b"", 0
        self._lane = lane
        self._messages = messages
        self._stream = stream
        self._compiled = compiled

    def __next__(self) -> bytes:
        compiled = None if self._stream.in_step else self._compiled
        self.last = packet = self._lane.receive() if compiled is None else compiled.receive()
        if packet:
            self.count += 1
            return packet
        self._lane.end()
        if next(self._messages, None) is None:
            if self._stream.in_step:
                raise UnavailableError("the packet lane broke off inside a step; attach again and repeat the step")
            raise StopIteration
        raise invalid_frame("over_stream", "the packet lane of this stream has ended; attach again")


def _read_packet(packet: bytes) -> Frame:
    if len(packet) > REQUEST_BYTES:
        raise invalid_frame("payload", f"a packet has more than {REQUEST_BYTES} bytes; send the step over the stream")
    frame = read_frame(pb.AttachRequest, packet)
    if frame.payload.size > PAYLOAD_BYTES:
        raise invalid_frame("payload", f"{frame.payload.size} bytes; a packet holds at most {PAYLOAD_BYTES}")
    return frame


def _is_alone(packet: Frame) -> bool:
    """Tell that the message that announces a step over the stream has nothing else.

    Raises:
        InvalidRequestError: it has.
    """
    others = [field.name for field, _ in packet.message.ListFields() if field.name not in ("over_stream", "padding")]
    if others:
        raise invalid_frame(others[0], "beside `over_stream` in a packet; that comes alone")
    return True
