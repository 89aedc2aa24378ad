"""A raw client whose streams have packet lanes: tests that know nothing of lanes go over them as they are.

A step of one message is a datagram, and every other message is announced there and goes over the stream.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import session_pb2, step_pb2, tensor_pb2, transport_pb2
from stepwire.wire.packets import PAYLOAD_BYTES
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.server import Server
from tests.support.raw_handoff import Handed, fetch

__all__ = ["LaneWire", "steps_in_lanes", "until_granted", "wait_for_loops"]

_PATIENCE_SECONDS = 120.0
_LOOK_SECONDS = 0.1


def wait_for_loops(server: Server) -> None:
    """Wait for the loops that are being compiled."""
    for device in server.registry.pool:
        if isinstance(device.engine, CpuEngine) and device.engine.lanes is not None:
            device.engine.lanes.settle()


def until_granted(server: Server, lanes: int, replay: Callable[[], object]) -> None:
    """Replay a lane's last step until so many lanes have grants; a replay counts as a step like the next one.

    A lane is granted, or has its loop compiled, behind its reply, so that nobody is told when it has looked.
    """
    end = time.monotonic() + _PATIENCE_SECONDS
    while server.lanes.statistics().granted < lanes:
        assert time.monotonic() < end, "no lane was granted"
        replay()
        wait_for_loops(server)
        looked = time.monotonic() + _LOOK_SECONDS
        while server.lanes.statistics().granted < lanes and time.monotonic() < looked:
            pass


def steps_in_lanes(server: Server) -> int:
    """Count the steps that lanes have made; whatever they have made is told first."""
    for session in server.registry.of(None):
        session.lane_steps.settle()
    return server.lanes.statistics().steps


class LaneWire:
    """A raw client with lanes, around one without.

    Attributes:
        creating: the fields of sessions that may have compiled lanes.
        lanes: the streams that had a lane.
        fresh: those of sessions without a step.
        grants: the streams whose next steps were granted to a loop before their first message.
    """

    def __init__(self, wire: Any, server: Server | None = None) -> None:
        """Put streams on lanes; with a server, have their next steps granted to a loop at once."""
        self.lanes = self.fresh = self.grants = 0
        self.server = server
        self.creating: dict[str, Any] = {} if server is None else {"telemetry": session_pb2.TELEMETRY_LEVEL_GRADIENT}
        self._wire = wire

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wire, name)

    def open(self, method: str = "Attach") -> Any:
        """Begin a stream whose messages are sent one by one."""
        return LaneStream(self, self._wire.open()) if method == "Attach" else self._wire.open(method)

    def stream(self, method: str, requests: Iterable[Any]) -> list[bytes]:
        """Call a streaming method of any kind, send everything, and return every answer."""
        if method != "Attach":
            answers: list[bytes] = self._wire.stream(method, requests)
            return answers
        stream, answers = self.open(), []
        try:
            for request in requests:
                stream.send(request)
                while stream.awaits_lane:  # where one step at a time is under way
                    answers.append(stream.receive())
            stream.finish()
            while True:
                answers.append(stream.receive())
        except StopIteration:
            return answers
        except Exception as refused:
            refused.answers = answers  # type: ignore[attr-defined]
            raise
        finally:
            stream.cancel()


class LaneStream:
    """One stream with its lane, if the server offers one."""

    def __init__(self, wire: LaneWire, stream: Any) -> None:
        self._wire = wire
        self._stream = stream
        self._session_id = ""
        self._handed: Handed | None = None
        self._lane: socket.socket | None = None
        self._opened: bytes | None = None
        self._asked = self._over_stream = False
        self._sources: list[bool] = []  # True for each reply that is due on the lane

    @property
    def over(self) -> bool:
        """The stream has ended."""
        return bool(self._stream.over)

    @property
    def awaits_lane(self) -> bool:
        """A reply is due on the lane."""
        return any(self._sources)

    def send(self, *messages: Any) -> None:
        """Send messages, on the lane or beside it."""
        for message in messages:
            if not self._asked:
                self._send_opening(message)
            elif self._lane_of_all() is None:
                self._stream.send(message)
            else:
                self._send(self._lane_of_all(), message)

    def receive(self) -> bytes:
        """Return the next answer; it raises as `OpenStream.receive` does."""
        if self._opened is not None:
            opened, self._opened = self._opened, None
            return opened
        if self._lane is not None and self._sources and self._sources[0]:
            self._sources.pop(0)
            if answer := _received(self._lane):
                return answer
        try:
            answer: bytes = self._stream.receive()
        except BaseException:
            self._let_go()
            raise
        if self._lane is None and self._handed is None:
            return self._learn(answer)
        if self._sources and pb.AttachResponse.FromString(answer).HasField("result"):
            self._sources.pop(0)
        return answer

    def finish(self) -> None:
        """Say that no more will come."""
        lane = self._lane_of_all()
        self._stream.finish()
        if lane is not None:
            _quietly(lambda: lane.shutdown(socket.SHUT_WR))

    def cancel(self) -> None:
        self._stream.cancel()
        self._let_go()

    def _let_go(self) -> None:
        if self._lane is not None:
            self._lane.close()
        if self._handed is not None:
            self._handed.close()

    def _send_opening(self, message: Any) -> None:
        self._asked = True
        if isinstance(message, pb.AttachRequest) and message.HasField("open") and not message.open.transport:
            message = pb.AttachRequest.FromString(message.SerializeToString())
            message.open.transport = transport_pb2.TRANSPORT_PACKETS
            self._session_id = message.open.session_id
        self._stream.send(message)

    def _lane_of_all(self) -> socket.socket | None:
        """Return the lane, once the server has answered the opening."""
        if self._lane is None and self._opened is None and self._asked and not self._stream.over:
            try:
                self._opened = self._learn(self._stream.receive())
            except Exception:  # which the next look at the stream raises again
                return None
        return self._lane

    def _learn(self, answer: bytes) -> bytes:
        """Take the lane that an answer offers, and return the answer as a stream without lanes has it."""
        message = pb.AttachResponse.FromString(answer)
        opened = message.opened
        if opened.transport != transport_pb2.TRANSPORT_PACKETS:
            return answer
        self._handed = fetch(opened.handoff.socket, transport_pb2.HandoffRequest(token=opened.handoff.token))
        self._lane = socket.socket(fileno=self._handed.descriptors.pop())
        self._lane.settimeout(_PATIENCE_SECONDS)
        self._wire.lanes += 1
        self._wire.fresh += not opened.applied_step
        if self._wire.server is not None and opened.applied_step:
            self._have_granted(self._wire.server, self._lane, opened.applied_step)
        for field in ("transport", "transport_reason", "handoff"):
            opened.ClearField(field)  # type: ignore[arg-type]
        return message.SerializeToString()

    def _have_granted(self, server: Server, lane: socket.socket, applied: int) -> None:
        """Replay the last step until the next ones are granted."""
        size = self._wire.get(self._session_id).layout.size
        message = pb.AttachRequest(
            begin=step_pb2.StepBegin(step=applied),
            chunk=tensor_pb2.Chunk(count=size),
            commit=step_pb2.StepCommit(),
            payload=bytes(4 * size),
        ).SerializeToString()

        def replay() -> None:
            lane.send(message)
            assert pb.AttachResponse.FromString(lane.recv(1 << 18)).result.replayed

        for _ in range(3):
            replay()
            wait_for_loops(server)
        until_granted(server, 1, replay)
        self._wire.grants += 1

    def _send(self, lane: socket.socket | None, message: Any) -> None:
        assert lane is not None
        plain = isinstance(message, pb.AttachRequest)
        whole = plain and message.HasField("begin") and message.HasField("commit") and not message.HasField("open")
        fits = not plain or whole and len(message.payload) <= PAYLOAD_BYTES
        if fits and not self._over_stream:
            self._sources.append(True)
            _quietly(lambda: lane.send(message.SerializeToString() if plain else message))
            return
        if not self._over_stream:
            _quietly(lambda: lane.send(pb.AttachRequest(over_stream=True).SerializeToString()))
        self._over_stream = not (plain and message.HasField("commit"))
        if not self._over_stream:
            self._sources.append(False)
        self._stream.send(message)


def _received(lane: socket.socket) -> bytes:
    """Return the next message of a lane; none at its end, whose reason the stream has."""
    try:
        return lane.recv(1 << 18)
    except ConnectionResetError:
        return b""


def _quietly(call: Any) -> None:
    try:
        call()
    except OSError:  # the server has ended the lane
        pass
