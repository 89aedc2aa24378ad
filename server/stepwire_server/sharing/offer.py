"""Offers shared memory to a client that attaches, or says why there is none."""

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
from stepwire_server.sharing.host_buffers import SharedBuffers
from stepwire_server.sharing.loans import Loans
from stepwire_server.sharing.shared_step import StreamMemory

__all__ = ["Shared", "Sharing"]

_log = structlog.get_logger()

# Of one client: each memory has one to hand out and one of its mapping, parameters in place one more, and there is the
# connection.
_DESCRIPTORS: Final = 6


class Shared(NamedTuple):
    """How the bulk data of one stream travels.

    Attributes:
        transport: in use.
        reason: why not the one that was asked for; empty if it is.
        handoff: where the client fetches the memory, if there is any.
        buffers: the memory, if there is any; its arrays are gone when the stream has ended.
    """

    transport: transport_pb2.Transport
    reason: str = ""
    handoff: transport_pb2.Handoff | None = None
    buffers: StreamMemory | None = None


class Sharing:
    """What a server shares with clients on its host.

    Attributes:
        off: why it shares no memory of the host; empty where it does.
        device_off: why it shares no memory of its devices; empty where it does.
    """

    def __init__(
        self, handoff: HandoffServer | None, off: str = "", device_off: str = "", loans: Loans | None = None
    ) -> None:
        """Hand memory over through a server, or say why there is none.

        Args:
            handoff: hands over; None where nothing is.
            off: why no memory of the host is shared; empty where it is.
            device_off: why no memory of devices is; empty where it is.
            loans: of device memory, where any is shared.
        """
        self.off = off
        self.device_off = device_off
        self._handoff = handoff
        self._loans = loans

    @property
    def features_off(self) -> frozenset[str]:
        """The features that this server does not have, of those that this build has."""
        off = {"transport_shm": self.off, "transport_cuda_ipc": self.device_off}
        return frozenset(feature for feature, why in off.items() if why)

    @contextlib.contextmanager
    def share(self, session: Session, asked: transport_pb2.Transport) -> Iterator[Shared]:
        """Share memory with a stream of a session for a block, if that was asked for and can be had.

        Raises:
            SessionNotFoundError: the session has ended.
        """
        why_not = self._why_not(asked)
        if self._handoff is None or why_not is not None:
            yield Shared(transport_pb2.TRANSPORT_GRPC, why_not or "")
            return
        with contextlib.ExitStack() as held:
            try:
                shared = held.enter_context(self._lent(session, self._handoff, asked))
            except (OSError, ResourceExhaustedError, DataLossError, UnsupportedFeatureError) as problem:
                _log.warning("no shared memory", session_id=session.session_id, problem=str(problem))
                shared = Shared(transport_pb2.TRANSPORT_GRPC, f"no shared memory: {problem}")
            yield shared

    @contextlib.contextmanager
    def _lent(self, session: Session, handoff: HandoffServer, asked: transport_pb2.Transport) -> Iterator[Shared]:
        """Share memory with a stream for a block.

        Raises:
            OSError, ResourceExhaustedError, DataLossError, UnsupportedFeatureError: it cannot be had.
        """
        buffers: SharedBuffers | DeviceBuffers
        end: Callable[[bytes], None]
        if asked == transport_pb2.TRANSPORT_SHM:
            _require_descriptors()
            buffers, end = SharedBuffers(session), handoff.drop
        else:  # who has it keeps its connection, because its end says that it can be freed
            assert self._loans is not None
            self._loans.check_room()
            buffers, end = DeviceBuffers(session, self._loans), handoff.withdraw
        with contextlib.closing(buffers):
            token = handoff.offer(buffers)
            try:
                yield Shared(asked, "", _handoff_message(handoff.path, token, session, buffers), buffers)
            finally:
                end(token)

    def _why_not(self, asked: transport_pb2.Transport) -> str | None:
        """Say why what was asked for is not to be had, "" where nothing was; None where it may be."""
        if asked in (transport_pb2.TRANSPORT_UNSPECIFIED, transport_pb2.TRANSPORT_GRPC):
            return ""
        if asked == transport_pb2.TRANSPORT_SHM:
            return self.off or None
        if asked == transport_pb2.TRANSPORT_CUDA_IPC:
            return self.device_off or None
        return f"this server does not serve transport {asked}"


def _require_descriptors() -> None:
    """Keep half of the descriptors for connections: without shared memory a server is slower, without those it is dead.

    Raises:
        OSError: too many are open.
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
