"""Opens a session's stream, over the best of the memories that its way offers, or over none."""

from __future__ import annotations

from stepwire.arrays.packing import Packer
from stepwire.connection.retry import Deadline
from stepwire.connection.stream import AttachedStream
from stepwire.errors import InvalidRequestError, Reason, StepwireError, UnavailableError, UnsupportedFeatureError
from stepwire.transports.available import MEMORIES
from stepwire.transports.cuda.arrays import DeviceArrays
from stepwire.transports.cuda.memory import DeviceMemory, fetch_device
from stepwire.transports.host.arrays import HostArrays
from stepwire.transports.host.memory import SharedMemory, fetch
from stepwire.transports.route import Route, Way
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import attach_pb2, transport_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

__all__ = ["open_stream"]


def open_stream(
    route: Route, opening: attach_pb2.AttachOpen, packer: Packer, deadline: Deadline
) -> tuple[AttachedStream, SharedArrays | None]:
    """Attach over the first memory that works; the route keeps the reason against each memory that does not.

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
        stream = _attached(way, opening, deadline)
        try:
            shared = _shared(stream, packer, deadline, way.calls.security.token)
            if isinstance(shared, SharedArrays):
                route.settle(way, name)
                return stream, shared
            if stream.is_cut:
                raise UnavailableError("the process forked while it attached; attach again", reason=Reason.UNREACHABLE)
            opening.attach_token, opening.worker = stream.opened.attach_token, stream.opened.worker
            opening.any_worker = False
            route.refuse(way, name, shared)
        except BaseException:
            stream.close()
            raise
        stream.close()  # the next stream goes in its place, because this one may hold memory that nobody uses
    opening.transport = transport_pb2.TRANSPORT_GRPC
    stream = _attached(way, opening, deadline)
    route.settle(way)
    return stream, None


def _attached(way: Way, opening: attach_pb2.AttachOpen, deadline: Deadline) -> AttachedStream:
    with way.calls.translated():
        return AttachedStream(way.calls.channel, opening, deadline, way.calls.metadata)


def _shared(stream: AttachedStream, packer: Packer, deadline: Deadline, access_token: str) -> SharedArrays | str:
    """Return the memory that the server shares with a stream, or the reason against it.

    Raises:
        UnavailableError: the connection broke.
    """
    opened = stream.opened
    if opened.transport not in MEMORIES.values() or not opened.HasField("handoff"):
        return opened.transport_reason or "the server does not say why"
    memory: SharedMemory | DeviceMemory
    try:
        if opened.transport == transport_pb2.TRANSPORT_CUDA_IPC:
            memory = fetch_device(opened.handoff, packer.layout.size, deadline.remaining(), access_token)
        else:
            memory = fetch(opened.handoff, packer.layout.size, deadline.remaining(), access_token)
    except StepwireError as failed:
        return str(failed)
    try:
        if problem := _check(stream, memory, deadline):
            memory.close()
            return problem
    except BaseException:
        memory.close()
        raise
    return DeviceArrays(memory, packer) if isinstance(memory, DeviceMemory) else HostArrays(memory, packer)


def _check(stream: AttachedStream, memory: SharedMemory | DeviceMemory, deadline: Deadline) -> str:
    """Return the reason for a difference between the memories of server and client; empty without one."""

    def ask(pattern: bytes) -> bytes:
        message = pb.AttachRequest(check=transport_pb2.MemoryCheck(pattern=pattern)).SerializeToString()
        checked: bytes = next(stream.exchange([message], deadline)).message.checked.parameters
        return checked

    try:
        return "" if memory.check(ask) else "the server sees other memory than it handed over"
    except (InvalidRequestError, UnsupportedFeatureError) as refused:
        return str(refused)
