"""Opens a session's stream, over the best of what its way offers to be handed over, or over none of it."""

from __future__ import annotations

from typing import Final, NamedTuple

from stepwire.arrays.packing import Packer
from stepwire.connection.retry import Deadline
from stepwire.connection.stream import AttachedStream, Carrier
from stepwire.errors import InvalidRequestError, Reason, StepwireError, UnavailableError, UnsupportedFeatureError
from stepwire.transports.available import MEMORIES
from stepwire.transports.cuda.arrays import DeviceArrays
from stepwire.transports.cuda.memory import DeviceMemory, fetch_device
from stepwire.transports.host.arrays import HostArrays
from stepwire.transports.host.memory import SharedMemory, fetch
from stepwire.transports.packets import PacketLane, fetch_lane
from stepwire.transports.route import Route, Way
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import attach_pb2, transport_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

__all__ = ["Opened", "open_stream"]

_MOST_ELEMENTS: Final = 64 << 10
"""The parameters whose step and whose reply are single messages, of 256 KiB in float32."""


class Opened(NamedTuple):
    """A stream, and whatever was handed over with it.

    Attributes:
        stream: the stream.
        shared: the memory that it shares; None without memory.
        lane: the packet lane that its messages travel on; None without a lane.
    """

    stream: AttachedStream
    shared: SharedArrays | None = None
    lane: PacketLane | None = None


def open_stream(route: Route, opening: attach_pb2.AttachOpen, packer: Packer, deadline: Deadline) -> Opened:
    """Attach over the first of `MEMORIES` that works; the route keeps the reason against each that does not.

    Args:
        route: the way to the server.
        opening: the first message; it gets the token of the first attempt, which has acquired the worker.
        packer: the packer of the session.
        deadline: the deadline of everything.

    Raises:
        UnsupportedFeatureError: a memory was asked for by name and cannot be had.
        StepwireError: the server refused, or cannot be reached.
    """
    way = route.way(deadline)
    for name in way.memories:
        opening.transport = MEMORIES[name]
        stream = _attached(way, opening, deadline, direct=True)
        try:
            opened = _handed_over(stream, packer, deadline, way.calls.security.token)
            if isinstance(opened, Opened):
                route.settle(way, name, stream.opened.transport_reason)
                return opened
            if stream.is_cut:
                raise UnavailableError("the process forked while it attached; attach again", reason=Reason.UNREACHABLE)
            opening.attach_token, opening.worker = stream.opened.attach_token, stream.opened.worker
            opening.any_worker = False
            route.refuse(way, name, opened)
        except BaseException:
            stream.close()
            raise
        stream.close()  # the next stream goes in its place, because this one may hold memory that nobody uses
    opening.transport = transport_pb2.TRANSPORT_GRPC
    stream = _attached(way, opening, deadline, direct=packer.layout.size <= _MOST_ELEMENTS)
    route.settle(way)
    return Opened(stream)


def _attached(way: Way, opening: attach_pb2.AttachOpen, deadline: Deadline, *, direct: bool) -> AttachedStream:
    with way.calls.translated():
        return AttachedStream(way.calls.channel, opening, deadline, way.calls.metadata, direct=direct)


def _handed_over(stream: AttachedStream, packer: Packer, deadline: Deadline, access_token: str) -> Opened | str:
    """Return a stream with what the server hands over, or the reason against it.

    Raises:
        UnavailableError: the connection broke.
    """
    opened = stream.opened
    if opened.transport not in MEMORIES.values() or not opened.HasField("handoff"):
        return opened.transport_reason or "the server does not say why"
    try:
        memory, lane = _fetched(stream, packer.layout.size, deadline, access_token)
    except StepwireError as failed:
        return str(failed)
    try:
        problem = "" if memory is None else _check(lane or stream, memory, deadline)
    except BaseException:
        _close(memory, lane)
        raise
    if problem:
        _close(memory, lane)
        return problem
    shared: SharedArrays | None = None
    if memory is not None:
        shared = DeviceArrays(memory, packer) if isinstance(memory, DeviceMemory) else HostArrays(memory, packer)
    return Opened(stream, shared, lane)


def _fetched(
    stream: AttachedStream, size: int, deadline: Deadline, access_token: str
) -> tuple[SharedMemory | DeviceMemory | None, PacketLane | None]:
    handoff, seconds = stream.opened.handoff, deadline.remaining()
    if stream.opened.transport == transport_pb2.TRANSPORT_CUDA_IPC:
        return fetch_device(handoff, size, seconds, access_token), None
    if stream.opened.transport == transport_pb2.TRANSPORT_SHM:
        return fetch(handoff, size, seconds, access_token), None
    lane, memory = fetch_lane(handoff, size, seconds, stream, access_token)
    return memory, lane


def _close(memory: SharedMemory | DeviceMemory | None, lane: PacketLane | None) -> None:
    for each in (memory, lane):
        if each is not None:
            each.close()


def _check(carrier: Carrier, memory: SharedMemory | DeviceMemory, deadline: Deadline) -> str:
    """Return the reason for a difference between the memories of server and client; empty without one."""

    def ask(pattern: bytes) -> bytes:
        message = pb.AttachRequest(check=transport_pb2.MemoryCheck(pattern=pattern)).SerializeToString()
        checked: bytes = next(carrier.exchange([message], deadline)).message.checked.parameters
        return checked

    try:
        return "" if memory.check(ask) else "the server sees other memory than it handed over"
    except (InvalidRequestError, UnsupportedFeatureError) as refused:
        return str(refused)
