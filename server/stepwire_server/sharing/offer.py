"""The offer of shared memory to a client that attaches, or the reason for none."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import structlog

from stepwire.errors import DataLossError, ResourceExhaustedError, UnsupportedFeatureError
from stepwire.v1 import transport_pb2
from stepwire.wire.dtypes import dtype_to_wire
from stepwire_server.sessions.session import Session
from stepwire_server.sharing.device_buffers import DeviceBuffers
from stepwire_server.sharing.handoff import HandoffServer
from stepwire_server.sharing.host_buffers import HostBuffers
from stepwire_server.sharing.loans import Loans
from stepwire_server.sharing.shared_step import StreamMemory

__all__ = ["Sharing", "StreamTransport"]

_log = structlog.get_logger()

# The descriptors of one client: two for each memory (the offered one and the mapping), one more for parameters in
# place, and the connection.
_DESCRIPTORS: Final = 6


class StreamTransport(NamedTuple):
    """The transport of one stream's bulk data.

    Attributes:
        transport: the transport in use.
        reason: the reason for another transport than the requested one; empty if there is none.
        handoff: the message with which the client fetches the memory; None without shared memory.
        buffers: the memory; None without shared memory. The arrays end with the stream.
    """

    transport: transport_pb2.Transport
    reason: str = ""
    handoff: transport_pb2.Handoff | None = None
    buffers: StreamMemory | None = None


class Sharing:
    """The memory that a server shares with clients on its host.

    Attributes:
        off: the reason why the server shares no host memory; empty if it shares host memory.
        device_off: the reason why the server shares no device memory; empty if it shares device memory.
    """

    def __init__(
        self, handoff: HandoffServer | None, off: str = "", device_off: str = "", loans: Loans | None = None
    ) -> None:
        """Offer memory through a handoff server, or keep the reason for none.

        Args:
            handoff: the handoff server; None if no memory is shared.
            off: the reason why no host memory is shared; empty if it is.
            device_off: the reason why no device memory is shared; empty if it is.
            loans: the loans of device memory; None if no device memory is shared.
        """
        self.off = off
        self.device_off = device_off
        self._handoff = handoff
        self._loans = loans

    @property
    def features_off(self) -> frozenset[str]:
        """The features of this build that this server does not have."""
        off = {"transport_shm": self.off, "transport_cuda_ipc": self.device_off}
        return frozenset(feature for feature, reason in off.items() if reason)

    @contextlib.contextmanager
    def share(self, session: Session, asked: transport_pb2.Transport) -> Iterator[StreamTransport]:
        """Share memory with a stream of a session for a block, if the client requests it and the server has it.

        Args:
            session: the session.
            asked: the transport that the client requests.

        Yields:
            The transport of the stream, with the memory or the reason for none.

        Raises:
            SessionNotFoundError: the session has ended.
        """
        refusal = self._refusal(asked, session)
        if self._handoff is None or refusal is not None:
            yield StreamTransport(transport_pb2.TRANSPORT_GRPC, refusal or "")
            return
        with contextlib.ExitStack() as resources:
            try:
                shared = resources.enter_context(self._lend(session, self._handoff, asked))
            except (OSError, ResourceExhaustedError, DataLossError, UnsupportedFeatureError) as problem:
                _log.warning("no shared memory", session_id=session.session_id, problem=str(problem))
                shared = StreamTransport(transport_pb2.TRANSPORT_GRPC, f"no shared memory: {problem}")
            yield shared

    @contextlib.contextmanager
    def _lend(
        self, session: Session, handoff: HandoffServer, asked: transport_pb2.Transport
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
            token = handoff.offer(buffers)
            try:
                yield StreamTransport(asked, "", _handoff_message(handoff.path, token, session, buffers), buffers)
            finally:
                end(token)

    def _refusal(self, asked: transport_pb2.Transport, session: Session) -> str | None:
        """Return the reason against the requested transport: "" for a request of none, None for no reason."""
        if asked in (transport_pb2.TRANSPORT_UNSPECIFIED, transport_pb2.TRANSPORT_GRPC):
            return ""
        if session.config.tables:
            return _TABLES
        if asked == transport_pb2.TRANSPORT_SHM:
            return self.off or None
        if asked == transport_pb2.TRANSPORT_CUDA_IPC:
            config = session.config
            kept = _JOURNALLED if config.durability.level == "journal" else _TOGETHER if config.aggregation else None
            return self.device_off or kept
        return f"this server does not serve transport {asked}"


_TABLES: Final = "the session has tables, whose rows travel in messages"
_TOGETHER: Final = "the gradients of several workers are added up on the host, so they cannot stay on the device"
_JOURNALLED: Final = "the session's gradients are journalled on the host, so they cannot stay on the device"


def _require_descriptors() -> None:
    """Keep half of the descriptors for connections: a server is slower without shared memory, and dead without them.

    Raises:
        OSError: too many descriptors are open.
    """
    most, used = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, len(os.listdir("/proc/self/fd"))
    if used + _DESCRIPTORS > most:
        raise OSError(f"{used} descriptors are open, and shared memory may use them up to {most}; raise `ulimit -n`")


def _handoff_message(path: str, token: bytes, session: Session, buffers: StreamMemory) -> transport_pb2.Handoff:
    return transport_pb2.Handoff(
        socket=path,
        token=token,
        gradient_dtype=dtype_to_wire(session.config.gradient_dtype),
        gradient_bytes=buffers.gradient_bytes,
        reply_dtype=dtype_to_wire(session.config.reply_dtype),
        parameter_bytes=buffers.parameter_bytes,
    )
