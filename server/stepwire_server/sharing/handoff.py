"""Hands memory over to processes of this host, each piece once, to who has its token and is the right user.

One thread serves the socket and never waits for a client: connections are few, each has until its deadline to send the
one datagram that it may send, and answers are small enough for an empty socket. After the handoff the connection stays
open, as the sign that the process uses the memory: the kernel closes it when the process dies, however it dies.
"""

from __future__ import annotations

import collections
import contextlib
import functools
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

__all__ = ["HandoffServer", "HandoffStatistics", "Offer", "peer_uid"]

_TOKEN_BYTES: Final = 16
_LARGEST_REQUEST: Final = 4096
_MOST_WAITING: Final = 64
_REQUEST_SECONDS: Final = 5.0
_PAUSE_SECONDS: Final = 1.0


class Offer(Protocol):
    """What waits to be fetched. Called in the thread of the server, so nothing here may wait for anything."""

    def descriptors(self) -> Sequence[int]:
        """Return the descriptors that go with the response."""
        ...

    def response(self) -> transport_pb2.HandoffResponse:
        """Return what goes with the descriptors."""
        ...

    def released(self) -> None:
        """The process that fetched it has closed its connection, has died, or was dropped."""
        ...


class HandoffStatistics(NamedTuple):
    """What a server is doing.

    Attributes:
        offers: not fetched yet.
        waiting: connections that were silent so far.
        holding: connections that have fetched.
        accepting: new connections are taken; not while descriptors are short.
    """

    offers: int
    waiting: int
    holding: int
    accepting: bool


class _Connection:
    """One client. `deadline` ends its silence; `offer` is what it has fetched."""

    def __init__(self, end: socket.socket, uid: int, deadline: float) -> None:
        self.end = end
        self.uid = uid
        self.deadline = deadline
        self.token = b""
        self.offer: Offer | None = None


def peer_uid(connection: socket.socket) -> int:
    """Return the user of the process that connected, as the kernel noted it then."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class HandoffServer:
    """Serves one listening socket. Thread-safe. A context manager; closes twice without complaint.

    Attributes:
        path: where clients connect.
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
        """Take over a socket; nothing is served before `start`.

        Args:
            path: where it listens.
            listener: of type SOCK_SEQPACKET.
            uids: users that may fetch.
            refusal: puts an error into a message.
            clock: what deadlines go by, in seconds.
            uid_of: tells the user at the other end.
        """
        self.path = path
        self._listener = listener
        self._uids = frozenset(uids)
        self._refusal = refusal
        self._clock = clock
        self._uid_of = uid_of
        self._lock = threading.Lock()  # of everything below
        self._offers: dict[bytes, Offer] = {}
        self._waiting: collections.OrderedDict[_Connection, None] = collections.OrderedDict()
        self._holding: dict[bytes, _Connection] = {}
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
        """Serve."""
        self._thread.start()

    def offer(self, offer: Offer) -> bytes:
        """Await a client for something; returns the token that it needs."""
        token = secrets.token_bytes(_TOKEN_BYTES)
        with self._lock:
            self._offers[token] = offer
        return token

    def withdraw(self, token: bytes) -> None:
        """Hand it to nobody any more; who has fetched it keeps its connection."""
        with self._lock:
            self._offers.pop(token, None)

    def drop(self, token: bytes) -> None:
        """Withdraw it, and end the connection of who has fetched it."""
        with self._lock:
            self._offers.pop(token, None)
            if (connection := self._holding.get(token)) is not None:
                with contextlib.suppress(OSError):  # the thread sees the end, and does the rest
                    connection.end.shutdown(socket.SHUT_RDWR)

    def statistics(self) -> HandoffStatistics:
        """Tell what the server is doing."""
        with self._lock:
            accepting = not self._accepts_from
            return HandoffStatistics(len(self._offers), len(self._waiting), len(self._holding), accepting)

    def close(self) -> None:
        """End every connection, and the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._waker.send(b"x")
        if self._thread.ident is not None:
            self._thread.join()
        for connection in [*self._waiting, *self._holding.values()]:
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
            for key, _ in self._selector.select(self._patience()):
                key.data()
            self._look_at_the_clock()

    def _patience(self) -> float | None:
        moments = [connection.deadline for connection in self._waiting]
        if self._accepts_from:
            moments.append(self._accepts_from)
        return max(min(moments) - self._clock(), 0.0) if moments else None

    def _look_at_the_clock(self) -> None:
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
        except OSError:  # no descriptors: the listener would be ready again at once, and again
            self._selector.unregister(self._listener)
            self._accepts_from = self._clock() + _PAUSE_SECONDS
            return
        end.setblocking(False)
        try:
            connection = _Connection(end, self._uid_of(end), self._clock() + _REQUEST_SECONDS)
        except OSError:
            end.close()
            return
        # The longest silence makes room: an honest client sends as soon as it has connected.
        if len(self._waiting) >= _MOST_WAITING:
            self._end(next(iter(self._waiting)))
        with self._lock:
            self._waiting[connection] = None
        self._selector.register(end, selectors.EVENT_READ, functools.partial(self._read, connection))

    def _read(self, connection: _Connection) -> None:
        if connection.end.fileno() < 0:  # ended since it became ready
            return
        try:
            request = connection.end.recv(_LARGEST_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            request = b""
        if not request or connection.offer is not None or not self._answer(connection, request):
            self._end(connection)

    def _answer(self, connection: _Connection, request: bytes) -> bool:
        """Answer a request; False if the connection is over then."""
        try:
            token = transport_pb2.HandoffRequest.FromString(request).token
        except DecodeError:
            token = b""
        # Under the lock, so that nothing is withdrawn, and its descriptors closed, while it is being sent.
        with self._lock:
            if connection.uid not in self._uids:
                return self._refuse(connection, _wrong_user(connection.uid))
            if (offer := self._offers.pop(token, None)) is None:
                return self._refuse(connection, _unknown_token())
            connection.token, connection.offer = token, offer
            try:
                _send(connection.end, offer.response(), offer.descriptors())
            except OSError:  # gone already, and what it would have fetched is used up
                return False
            del self._waiting[connection]
            self._holding[token] = connection
            return True

    def _refuse(self, connection: _Connection, error: StepwireError) -> bool:
        with contextlib.suppress(OSError):
            _send(connection.end, transport_pb2.HandoffResponse(refused=self._refusal(error)), ())
        return False

    def _end(self, connection: _Connection) -> None:
        with self._lock:
            self._waiting.pop(connection, None)
            self._holding.pop(connection.token, None)
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
        f"memory is shared with processes of the server's own user, and this one is of uid {uid}; run both as one "
        "user, or start the server with --handoff-uids",
        metadata={"uid": uid},
    )


def _unknown_token() -> AuthenticationError:
    return AuthenticationError("the token is unknown, was used, or is of a stream that has ended; attach again")
