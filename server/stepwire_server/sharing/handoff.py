"""The handoff of memory to processes of this host: once for each offer, to the right user with the right token.

Where clients have access tokens, whoever fetches proves that it has that of the stream: the token of the handoff alone
is of no use to another identity of the same user, or of another user that may share memory.

One thread serves the socket and never waits for a client. Connections are few, each has a deadline for its only
datagram, and a reply is small enough for an empty socket. The connection stays open after the handoff, as the sign that
the process uses the memory. The kernel closes the connection with the process, after any kind of death.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hmac
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Final, NamedTuple, Protocol

from google.protobuf.message import DecodeError

from stepwire.errors import AuthenticationError, PermissionDeniedError, StepwireError
from stepwire.v1 import status_pb2, transport_pb2
from stepwire.wire.handoff_proof import handoff_proof

__all__ = ["HandoffServer", "HandoffStatistics", "Offer", "peer_uid"]

_TOKEN_BYTES: Final = 16
_LARGEST_REQUEST: Final = 4096
_MOST_WAITING: Final = 64
_REQUEST_SECONDS: Final = 5.0
_PAUSE_SECONDS: Final = 1.0


class Offer(Protocol):
    """Memory that waits for a client. The methods run in the thread of the server, so none of them may wait."""

    def descriptors(self) -> Sequence[int]:
        """Return the descriptors that go with the response."""
        ...

    def response(self) -> transport_pb2.HandoffResponse:
        """Return the message that goes with the descriptors."""
        ...

    def released(self) -> None:
        """Note that the client of the offer has closed its connection, has died, or was dropped."""
        ...


class HandoffStatistics(NamedTuple):
    """The state of a handoff server.

    Attributes:
        offers: the number of offers that wait for their client.
        waiting: the number of connections without a request so far.
        fetched: the number of connections that have fetched their memory.
        accepting: True if new connections are accepted; False during a shortage of descriptors.
    """

    offers: int
    waiting: int
    fetched: int
    accepting: bool


class _Connection:
    """One client, with the deadline of its request and the offer that it has fetched."""

    def __init__(self, end: socket.socket, uid: int, deadline: float) -> None:
        self.end = end
        self.uid = uid
        self.deadline = deadline
        self.token = b""
        self.offer: Offer | None = None


def peer_uid(connection: socket.socket) -> int:
    """Return the user of the process at the other end, as the kernel noted the user at the connection."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class HandoffServer:
    """Serves one listening socket. Thread-safe. A context manager; closes twice without complaint.

    Attributes:
        path: the path of the socket.
    """

    def __init__(
        self,
        path: str,
        listener: socket.socket,
        uids: Collection[int],
        refusal: Callable[[StepwireError], status_pb2.RichStatus],
        *,
        clock: Callable[[], float] = time.monotonic,
        uid_of: Callable[[socket.socket], int] = peer_uid,
    ) -> None:
        """Own a listening socket from now on; nothing is served before `start`.

        Args:
            path: the path of the socket.
            listener: the socket, of type SOCK_SEQPACKET.
            uids: the users that may fetch memory.
            refusal: a function that returns the message of an error.
            clock: the clock of deadlines, in seconds.
            uid_of: a function that returns the user at the other end of a connection.
        """
        self.path = path
        self._listener = listener
        self._uids = frozenset(uids)
        self._refusal = refusal
        self._clock = clock
        self._uid_of = uid_of
        self._lock = threading.Lock()  # of everything below
        self._offers: dict[bytes, tuple[Offer, bytes]] = {}
        self._waiting: collections.OrderedDict[_Connection, None] = collections.OrderedDict()
        self._fetched: dict[bytes, _Connection] = {}
        self._accepts_from = 0.0
        self._closed = False
        self._waker, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._run, name="handoff", daemon=True)
        listener.setblocking(False)
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: None)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def offer(self, offer: Offer, access_token: str = "") -> bytes:
        """Offer memory to a client; return the token that the client needs.

        Args:
            offer: the memory.
            access_token: the token that the client's stream was attached with: only whoever has it fetches the memory.
                Empty for a server without tokens.
        """
        token = secrets.token_bytes(_TOKEN_BYTES)
        with self._lock:
            self._offers[token] = offer, handoff_proof(access_token, token)
        return token

    def withdraw(self, token: bytes) -> None:
        """Withdraw an offer; a client that has fetched its memory keeps the connection."""
        with self._lock:
            self._offers.pop(token, None)

    def drop(self, token: bytes) -> None:
        """Withdraw an offer, and end the connection of a client that has fetched its memory."""
        with self._lock:
            self._offers.pop(token, None)
            if (connection := self._fetched.get(token)) is not None:
                with contextlib.suppress(OSError):  # the thread notices the end, and does the rest
                    connection.end.shutdown(socket.SHUT_RDWR)

    def statistics(self) -> HandoffStatistics:
        """Return the state of the server."""
        with self._lock:
            accepting = not self._accepts_from
            return HandoffStatistics(len(self._offers), len(self._waiting), len(self._fetched), accepting)

    def close(self) -> None:
        """End every connection, and the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._waker.send(b"x")
        if self._thread.ident is not None:
            self._thread.join()
        for connection in [*self._waiting, *self._fetched.values()]:
            self._end(connection)
        self._selector.close()
        for end in (self._listener, self._waker, self._woken):
            end.close()

    def __enter__(self) -> HandoffServer:
        """Serve for a block."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    # --- in the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(self._seconds_until_deadline()):
                key.data()
            self._apply_deadlines()

    def _seconds_until_deadline(self) -> float | None:
        deadlines = [connection.deadline for connection in self._waiting]
        if self._accepts_from:
            deadlines.append(self._accepts_from)
        return max(min(deadlines) - self._clock(), 0.0) if deadlines else None

    def _apply_deadlines(self) -> None:
        now = self._clock()
        for connection in [connection for connection in self._waiting if connection.deadline <= now]:
            self._end(connection)
        if self._accepts_from and self._accepts_from <= now:
            self._accepts_from = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            end, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:  # no descriptors: the listener would stay ready, and the loop would spin
            self._selector.unregister(self._listener)
            self._accepts_from = self._clock() + _PAUSE_SECONDS
            return
        end.setblocking(False)
        try:
            connection = _Connection(end, self._uid_of(end), self._clock() + _REQUEST_SECONDS)
        except OSError:
            end.close()
            return
        # The connection with the longest silence is ended: an honest client sends at once after it has connected.
        if len(self._waiting) >= _MOST_WAITING:
            self._end(next(iter(self._waiting)))
        with self._lock:
            self._waiting[connection] = None
        self._selector.register(end, selectors.EVENT_READ, functools.partial(self._read, connection))

    def _read(self, connection: _Connection) -> None:
        if connection.end.fileno() < 0:  # ended after it became ready
            return
        try:
            request = connection.end.recv(_LARGEST_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            request = b""
        if not request or connection.offer is not None or not self._reply(connection, request):
            self._end(connection)

    def _reply(self, connection: _Connection, request: bytes) -> bool:
        """Reply to a request; return False if the connection ends."""
        try:
            asked = transport_pb2.HandoffRequest.FromString(request)
        except DecodeError:
            asked = transport_pb2.HandoffRequest()
        # Under the lock, so that no offer is withdrawn, and its descriptors closed, during the send.
        with self._lock:
            if connection.uid not in self._uids:
                return self._refuse(connection, _wrong_user(connection.uid))
            offer, proof = self._offers.get(asked.token, (None, b""))
            if offer is None:
                return self._refuse(connection, _unknown_token())
            if proof and not hmac.compare_digest(proof, asked.proof):  # the offer stays, for whoever it is for
                return self._refuse(connection, _wrong_identity())
            del self._offers[asked.token]
            connection.token, connection.offer = asked.token, offer
            try:
                _send(connection.end, offer.response(), offer.descriptors())
            except OSError:  # the client is gone, and the offer is used up
                return False
            del self._waiting[connection]
            self._fetched[asked.token] = connection
            return True

    def _refuse(self, connection: _Connection, error: StepwireError) -> bool:
        with contextlib.suppress(OSError):
            _send(connection.end, transport_pb2.HandoffResponse(refused=self._refusal(error)), ())
        return False

    def _end(self, connection: _Connection) -> None:
        with self._lock:
            self._waiting.pop(connection, None)
            self._fetched.pop(connection.token, None)
            self._selector.unregister(connection.end)
            connection.end.close()
        if connection.offer is not None:
            connection.offer.released()


def _send(end: socket.socket, response: transport_pb2.HandoffResponse, descriptors: Sequence[int]) -> None:
    data = response.SerializeToString()
    if descriptors:
        socket.send_fds(end, [data], list(descriptors))
    else:
        end.send(data)


def _wrong_user(uid: int) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"memory is shared with processes of the server's user, and this one is of uid {uid}. Run both as one user, "
        "or start the server with --handoff-uids",
        metadata={"uid": uid},
    )


def _wrong_identity() -> AuthenticationError:
    return AuthenticationError(
        "the token of the handoff is of a stream that was attached with another access token; attach with your own"
    )


def _unknown_token() -> AuthenticationError:
    return AuthenticationError("the token is unknown, was used, or is of a stream that has ended; attach again")
