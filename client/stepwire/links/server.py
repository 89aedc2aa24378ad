"""The seam between a client and its server, and the link to one server: sessions made, found and listed."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol

from stepwire.connection.channel import Calls, checked_timeout
from stepwire.connection.errands import is_left, later
from stepwire.connection.retry import Deadline
from stepwire.connection.watch import Closable, Watch
from stepwire.errors import InvalidRequestError, Reason, StepwireError, UnsupportedFeatureError
from stepwire.links.link import SessionLink
from stepwire.links.remote import RemoteLink
from stepwire.results import ServerInfo, SessionInfo
from stepwire.statistics import Statistics
from stepwire.steps.description import SessionDescription
from stepwire.transports.route import Route, Router
from stepwire.v1 import move_pb2, session_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.version import PROTOCOL_MAX, PROTOCOL_MIN
from stepwire.wire.channel_options import LARGEST_REQUEST_BYTES
from stepwire.wire.messages import duration_to_wire

__all__ = ["CreatedLink", "LinkOptions", "RemoteServer", "ServerLink"]

_END_SECONDS: Final = 5.0


class LinkOptions(NamedTuple):
    """The options of a link that its client alone knows.

    Attributes:
        error_feedback: keep the encoding error of each gradient for the next one.
        worker: the index of the worker that the client steps as; None for whichever is vacant.
    """

    error_feedback: bool = False
    worker: int | None = 0


class CreatedLink(NamedTuple):
    """The link to a session of one server that was asked for, and whether it is new."""

    link: RemoteLink
    is_new: bool


class ServerLink(Protocol):
    """The way to one server, or to several that hold sharded sessions. Thread-safe; closes twice without complaint."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets of the servers, in order."""

    def info(self, timeout: float | None) -> ServerInfo:
        """Ask for the properties of the server.

        Raises:
            UnavailableError: the server cannot be reached.
        """

    def create(
        self, config: session_pb2.SessionConfig, request_id: str | None, timeout: float | None, options: LinkOptions
    ) -> SessionLink:
        """Create a session without parameters, or find the session of an earlier request of this id.

        Raises:
            StepwireError: as `Client.create_session`.
        """

    def find(self, session_id: str, timeout: float | None, options: LinkOptions) -> SessionLink:
        """Return the link to a session that exists.

        Raises:
            StepwireError: as `Client.session`.
        """

    def fork(
        self, session_id: str, request: pb.ForkSessionRequest, timeout: float | None, *, error_feedback: bool
    ) -> SessionLink:
        """Create a session that begins with a state of another one, or find the session of an earlier request.

        Args:
            session_id: the id of the session to fork.
            request: what the fork is to be; without a request id it gets a random one.
            timeout: seconds.
            error_feedback: as for `create`.

        Raises:
            StepwireError: as `Session.fork`.
        """

    def sessions(self, timeout: float | None) -> Iterator[SessionInfo]:
        """Yield the sessions of the server.

        Raises:
            UnavailableError: the server cannot be reached.
        """

    def statistics(self, interval: float, timeout: float | None) -> Closable[Statistics]:
        """Return an iterator over snapshots of the server, which begins with the first.

        Raises:
            InvalidRequestError: a number is out of range.
        """

    def close(self) -> None:
        """Close the connections; sessions stay on the server."""


class RemoteServer(ServerLink):
    """The link to one server.

    Attributes:
        calls: the connection that the user named.
    """

    def __init__(self, calls: Calls, transport: str = "auto", *, window_bytes: int = 0) -> None:
        """Use an open channel; sessions use `transport` unless they ask for another.

        Args:
            calls: the channel.
            transport: the transport of sessions that ask for none.
            window_bytes: the most bytes of steps that each session keeps for a server that loses them.
        """
        self._window_bytes = window_bytes
        self.calls = calls
        self._router = Router(calls, transport)
        self._info: ServerInfo | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The target of the connection."""
        return (self.calls.target,)

    def info(self, timeout: float | None) -> ServerInfo:
        """See `ServerLink.info`."""
        response = self.calls.unary("GetServerInfo", pb.GetServerInfoRequest(), pb.GetServerInfoResponse, timeout)
        return ServerInfo.from_wire(response)

    def create(
        self, config: session_pb2.SessionConfig, request_id: str | None, timeout: float | None, options: LinkOptions
    ) -> RemoteLink:
        """See `ServerLink.create`."""
        return self.created(config, request_id, timeout, options).link

    def created(
        self, config: session_pb2.SessionConfig, request_id: str | None, timeout: float | None, options: LinkOptions
    ) -> CreatedLink:
        """Create a session, and tell whether it is new; see `ServerLink.create`."""
        chunk_bytes = self._chunk_bytes(timeout)
        request = pb.CreateSessionRequest(request_id=request_id or secrets.token_hex(16), config=config)
        if (size := request.ByteSize()) > LARGEST_REQUEST_BYTES:
            raise InvalidRequestError.of(
                "parameters",
                f"the names and shapes of {len(config.tensors)} tensors take {size} bytes, and a server receives "
                f"{LARGEST_REQUEST_BYTES} at most; shorten the names, or join small tensors",
                reason=Reason.INVALID_TENSOR,
            )
        try:
            response = self.calls.unary("CreateSession", request, pb.CreateSessionResponse, timeout)
        except StepwireError:
            if is_left() and request_id is None:  # the session may exist, and nobody else would end it
                later(functools.partial(self._end, request))
            raise
        # An earlier request of this id may come from another process. Then the first step acquires the worker anew:
        # two holders of one token would mistake each other's steps for their own.
        token = response.attach_token
        if response.replayed or options.worker not in (0, None):
            token = 0
        else:
            options = options._replace(worker=0)
        return CreatedLink(self._link(response.session, chunk_bytes, token, options), not response.replayed)

    def find(self, session_id: str, timeout: float | None, options: LinkOptions, *, token: int = 0) -> RemoteLink:
        """See `ServerLink.find`; `token` proves a hold that the caller has, 0 for none."""
        chunk_bytes = self._chunk_bytes(timeout)
        request = pb.GetSessionRequest(session_id=session_id)
        response = self.calls.unary("GetSession", request, pb.GetSessionResponse, timeout)
        return self._link(response.session, chunk_bytes, token, options)

    def successor(
        self, session_id: str, token: int, deadline: Deadline, worker: int = 0
    ) -> list[move_pb2.SuccessorShard]:
        """Ask once where a session lives on; nothing is returned for one that is still here.

        Args:
            session_id: the session's id.
            token: the proof of the hold that the caller had, for the tokens of the successor; 0 for none.
            deadline: the deadline of the call.
            worker: the index of the worker of that hold.

        Raises:
            SessionNotFoundError: there is no such session.
            FencedError: the caller had lost the worker.
            UnavailableError: the server cannot be reached.
        """
        request = pb.GetSuccessorRequest(session_id=session_id, attach_token=token, worker=worker)
        try:
            response = self.calls.once("GetSuccessor", request, pb.GetSuccessorResponse, deadline.remaining())
        except StepwireError as error:
            raise self.calls.followed(error, deadline) from None
        return list(response.successor.shards)

    def fork(
        self, session_id: str, request: pb.ForkSessionRequest, timeout: float | None, *, error_feedback: bool
    ) -> RemoteLink:
        """See `ServerLink.fork`."""
        chunk_bytes, own = self._chunk_bytes(timeout), pb.ForkSessionRequest()
        own.CopyFrom(request)
        own.session_id, own.request_id = session_id, request.request_id or secrets.token_hex(16)
        response = self.calls.unary("ForkSession", own, pb.ForkSessionResponse, timeout)
        token = 0 if response.replayed else response.attach_token  # as in `create`
        return self._link(response.session, chunk_bytes, token, LinkOptions(error_feedback))

    def sessions(self, timeout: float | None) -> Iterator[SessionInfo]:
        """See `ServerLink.sessions`; the sessions come ordered by id."""
        token = ""
        while True:
            request = pb.ListSessionsRequest(page_token=token)
            page = self.calls.unary("ListSessions", request, pb.ListSessionsResponse, timeout)
            yield from map(SessionInfo.from_wire, page.sessions)
            if not (token := page.next_page_token):
                return

    def statistics(self, interval: float, timeout: float | None) -> Watch[Statistics]:
        """See `ServerLink.statistics`."""
        request = pb.GetStatisticsRequest(interval=duration_to_wire(interval))
        seconds = (self.calls.timeout_seconds if timeout is None else checked_timeout(timeout)) + interval

        def read(data: bytes) -> Statistics:
            return Statistics.from_wire(pb.GetStatisticsResponse.FromString(data), self.calls.target)

        return Watch(self.calls, "GetStatistics", request.SerializeToString(), read, seconds)

    def close(self) -> None:
        """See `ServerLink.close`."""
        self._router.close()
        self.calls.close()

    def _link(self, message: session_pb2.Session, chunk_bytes: int, token: int, options: LinkOptions) -> RemoteLink:
        route = Route(self._router, message.session_id)
        return RemoteLink(
            route,
            SessionDescription.of(message, chunk_bytes),
            token,
            error_feedback=options.error_feedback,
            worker=options.worker,
            window_bytes=self._window_bytes,
        )

    def _end(self, request: pb.CreateSessionRequest) -> None:
        """End the session of a creation whose caller was interrupted; its request again tells the id."""
        response = self.calls.unary("CreateSession", request, pb.CreateSessionResponse, _END_SECONDS)
        ending = pb.DeleteSessionRequest(session_id=response.session.session_id)
        self.calls.unary("DeleteSession", ending, pb.DeleteSessionResponse, _END_SECONDS)

    def _chunk_bytes(self, timeout: float | None) -> int:
        """Return the largest chunk that the server accepts, after one check that the server speaks our protocol."""
        if self._info is None:
            info = self.info(timeout)
            if info.protocol_min > PROTOCOL_MAX or info.protocol_max < PROTOCOL_MIN:
                raise UnsupportedFeatureError(
                    f"the server {info.version} speaks protocol {info.protocol_min} to {info.protocol_max}, this "
                    f"client {PROTOCOL_MIN} to {PROTOCOL_MAX}; bring the older of the two up to date",
                    metadata={"field": "protocol", "feature": "protocol"},
                )
            self._info = info
        return self._info.max_chunk_bytes
