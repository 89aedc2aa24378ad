"""The offer of shared memory to a client that attaches, or the reason for none."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

import structlog

from stepwire.errors import DataLossError, ResourceExhaustedError, UnsupportedFeatureError
from stepwire.v1 import transport_pb2
from stepwire.wire.dtypes import dtype_to_wire
from stepwire_server.sessions.session import Session
from stepwire_server.sharing.device_buffers import DeviceBuffers
from stepwire_server.sharing.handoff import HandoffServer
from stepwire_server.sharing.host_buffers import HostBuffers
from stepwire_server.sharing.lane_offer import LaneOffer, is_small, tells_little
from stepwire_server.sharing.loans import Loans
from stepwire_server.sharing.packet_lane import PacketLane
from stepwire_server.sharing.shared_step import StreamMemory

__all__ = ["Sharing", "StreamTransport"]

_log = structlog.get_logger()

# The descriptors of one client: two for each memory (the offered one and the mapping), one more for parameters in
# place, the connection, and both ends of a packet lane.
_DESCRIPTORS: Final = 8


class StreamTransport(NamedTuple):
    """The transport of one stream's bulk data.

    Attributes:
        transport: the transport in use.
        reason: the reason for another transport than the requested one; empty if there is none.
        handoff: the message with which the client fetches the memory and the lane; None without either.
        buffers: the memory; None without shared memory. The arrays end with the stream.
        lane: the packet lane; None without one. It ends with the stream.
    """

    transport: transport_pb2.Transport
    reason: str = ""
    handoff: transport_pb2.Handoff | None = None
    buffers: StreamMemory | None = None
    lane: PacketLane | None = None


class Sharing:
    """The memory that a server shares with clients on its host, and the lanes beside it."""

    def __init__(
        self,
        handoff: HandoffServer | None,
        off: Mapping[transport_pb2.Transport, str],
        loans: Loans | None = None,
    ) -> None:
        """Offer memory and lanes through a handoff server, or keep the reasons for none.

        Args:
            handoff: the handoff server; None if nothing is offered.
            off: the reason against each transport of `transport.proto`; empty for one that is offered.
            loans: the loans of device memory; None if no device memory is shared.
        """
        self._handoff = handoff
        self._off = off
        self._loans = loans

    @property
    def features_off(self) -> frozenset[str]:
        """The features of this build that this server does not have."""
        return frozenset(feature for transport, feature in _FEATURES.items() if self._off[transport])

    @contextlib.contextmanager
    def share(
        self, session: Session, asked: transport_pb2.Transport, access_token: str = ""
    ) -> Iterator[StreamTransport]:
        """Share memory, or a lane, with a stream of a session for a block, if the client requests what the server has.

        Args:
            session: the session.
            asked: the transport that the client requests.
            access_token: the token that the client has attached with; empty for none.

        Yields:
            The transport of the stream, with its parts or the reason for none.

        Raises:
            SessionNotFoundError: the session has ended.
        """
        refusal = self._refusal(asked, session)
        if self._handoff is None or refusal is not None:
            yield StreamTransport(transport_pb2.TRANSPORT_GRPC, refusal or "")
            return
        lend = self._lend_lane if asked == transport_pb2.TRANSPORT_PACKETS else self._lend
        with contextlib.ExitStack() as resources:
            try:
                shared = resources.enter_context(lend(session, self._handoff, asked, access_token))
            except _NO_MEMORY as problem:
                shared = StreamTransport(transport_pb2.TRANSPORT_GRPC, _no_memory(session, problem))
            yield shared

    @contextlib.contextmanager
    def _lend(
        self, session: Session, handoff: HandoffServer, asked: transport_pb2.Transport, access_token: str
    ) -> Iterator[StreamTransport]:
        """Share memory with a stream for a block.

        Raises:
            OSError, ResourceExhaustedError, DataLossError, UnsupportedFeatureError: there is no memory to share.
        """
        buffers: HostBuffers | DeviceBuffers
        end: Callable[[bytes], None]
        if asked == transport_pb2.TRANSPORT_SHM:
            _require_descriptors()
            buffers, end = HostBuffers(session), handoff.drop
        else:  # a client keeps its connection after the stream: its end says that the memory can be freed
            assert self._loans is not None
            self._loans.check_room()
            buffers, end = DeviceBuffers(session, self._loans), handoff.withdraw
        with contextlib.closing(buffers):
            token = handoff.offer(buffers, access_token)
            try:
                yield StreamTransport(asked, "", _handoff_message(handoff.path, token, session, buffers), buffers)
            finally:
                end(token)

    @contextlib.contextmanager
    def _lend_lane(
        self, session: Session, handoff: HandoffServer, asked: transport_pb2.Transport, access_token: str
    ) -> Iterator[StreamTransport]:
        """Share a lane with a stream for a block, and memory if there is some.

        Raises:
            OSError: there are no descriptors left.
        """
        _require_descriptors()
        with contextlib.ExitStack() as resources:
            buffers, reason = self._memory_beside_lane(session, resources)
            if buffers is None and not is_small(session.config):
                yield StreamTransport(transport_pb2.TRANSPORT_GRPC, f"{reason}; the steps are too large for packets")
                return
            lane = resources.enter_context(contextlib.closing(PacketLane()))
            token = handoff.offer(LaneOffer(lane, buffers), access_token)
            resources.callback(handoff.drop, token)
            message = _handoff_message(handoff.path, token, session, buffers)
            yield StreamTransport(asked, reason, message, buffers, lane)

    def _memory_beside_lane(self, session: Session, resources: contextlib.ExitStack) -> tuple[HostBuffers | None, str]:
        """Return the memory of a stream that has a lane, or None and the reason."""
        if off := self._off[transport_pb2.TRANSPORT_SHM]:
            return None, off
        try:
            return resources.enter_context(contextlib.closing(HostBuffers(session))), ""
        except _NO_MEMORY as problem:
            return None, _no_memory(session, problem)

    def _refusal(self, asked: transport_pb2.Transport, session: Session) -> str | None:
        """Return the reason against the requested transport: "" for a request of none, None for no reason."""
        if asked in (transport_pb2.TRANSPORT_UNSPECIFIED, transport_pb2.TRANSPORT_GRPC):
            return ""
        if asked not in _FEATURES:
            return f"this server does not serve transport {asked}"
        if session.config.tables:
            return _TABLES
        kept = None
        if asked == transport_pb2.TRANSPORT_CUDA_IPC:
            config = session.config
            kept = _JOURNALLED if config.durability.level == "journal" else _TOGETHER if config.aggregation else None
        elif asked == transport_pb2.TRANSPORT_PACKETS and not tells_little(session.config):
            kept = "the result of a step has more groups or workers than a packet has room for"
        return self._off[asked] or kept


_FEATURES: Final[Mapping[transport_pb2.Transport, str]] = {
    transport_pb2.TRANSPORT_SHM: "transport_shm",
    transport_pb2.TRANSPORT_CUDA_IPC: "transport_cuda_ipc",
    transport_pb2.TRANSPORT_PACKETS: "transport_packets",
}
_NO_MEMORY: Final = (OSError, ResourceExhaustedError, DataLossError, UnsupportedFeatureError)
_TABLES: Final = "the session has tables, whose rows travel in messages"
_TOGETHER: Final = "the gradients of several workers are added up on the host, so they cannot stay on the device"
_JOURNALLED: Final = "the session's gradients are journalled on the host, so they cannot stay on the device"


def _no_memory(session: Session, problem: Exception) -> str:
    _log.warning("no shared memory", session_id=session.session_id, problem=str(problem))
    return f"no shared memory: {problem}"


def _require_descriptors() -> None:
    """Keep half of the descriptors for connections: a server is slower without shared memory, and dead without them.

    Raises:
        OSError: too many descriptors are open.
    """
    most, used = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, len(os.listdir("/proc/self/fd"))
    if used + _DESCRIPTORS > most:
        raise OSError(f"{used} descriptors are open, and shared memory may use them up to {most}; raise `ulimit -n`")


def _handoff_message(path: str, token: bytes, session: Session, buffers: StreamMemory | None) -> transport_pb2.Handoff:
    return transport_pb2.Handoff(
        socket=path,
        token=token,
        gradient_dtype=dtype_to_wire(session.config.gradient_dtype),
        gradient_bytes=0 if buffers is None else buffers.gradient_bytes,
        reply_dtype=dtype_to_wire(session.config.reply_dtype),
        parameter_bytes=0 if buffers is None else buffers.parameter_bytes,
    )
