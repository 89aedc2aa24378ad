"""All sessions of a server: create, find, list, end, and sweep away what nobody uses."""

from __future__ import annotations

import contextlib
import secrets
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from stepwire.errors import InvalidRequestError, Reason, ResourceExhaustedError
from stepwire_server.devices.pool import Device, DevicePool
from stepwire_server.records.committed import CommitSink
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.idle import with_idle_sessions
from stepwire_server.sessions.ledger import session_not_found
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.workers import FIRST_GENERATION

__all__ = ["Created", "Registry", "RegistryStatistics"]

# Of clients whose connection is half open: the server still counts the stream that they come to replace.
_RETURNING_STREAMS: Final = 8


class Created(NamedTuple):
    """A created session.

    Attributes:
        session: it.
        token: of the hold of worker 0.
        replayed: the request had created it before.
    """

    session: Session
    token: int
    replayed: bool


class RegistryStatistics(NamedTuple):
    """What the registry is doing: sessions alive, streams attached, bytes reserved of all budgets together."""

    sessions: int
    streams: int
    reserved_bytes: int
    budget_bytes: int


class Registry:
    """Owns the sessions. Thread-safe."""

    def __init__(
        self,
        pool: DevicePool,
        *,
        max_sessions: int,
        max_streams: int,
        step_idle_seconds: float,
        clock: Callable[[], float],
        sinks: Sequence[CommitSink] = (),
    ) -> None:
        """Start without sessions; `sinks` are told of each commit."""
        self.pool = pool
        self.clock = clock
        self._sinks = tuple(sinks)
        self._max_sessions = max_sessions
        self._max_streams = max_streams
        self._step_idle_seconds = step_idle_seconds
        self._lock = threading.Lock()
        self._creation = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._by_request: dict[str, Session] = {}
        self._streams: set[ClientStream] = set()
        self._uploads: set[ClientStream] = set()

    def create(self, request_id: str, config: SessionConfig) -> Created:
        """Create a session, or return the one that this request created before.

        Raises:
            InvalidRequestError: the request id came before with another config.
            UnsupportedFeatureError: the config names a device that the server does not have.
            ResourceExhaustedError: too many sessions, or no memory for this one.
        """
        # One creation at a time: a repeated request that overtakes the first would otherwise make two, and two that
        # look for the emptiest device would find the same. Allocating and compiling take a while, so the maps have a
        # lock of their own that nobody holds for long.
        with self._creation:
            known = self._by_request.get(request_id)
            if known is not None and not known.ledger.closed and not known.expired(self.clock()):
                return self._created_before(request_id, known, config)
            if len(self._sessions) >= self._max_sessions:
                too_many = ResourceExhaustedError(
                    f"the server holds {len(self._sessions)} sessions, its most; close some, or start it with a "
                    "larger --max-sessions",
                    reason=Reason.TOO_MANY_SESSIONS,
                    metadata={"max_sessions": self._max_sessions},
                )
                raise with_idle_sessions(too_many, self._present(), self.clock())
            session = self._made(config, self.pool.choose(config.device))
            token = session.acquire().generation
            with self._lock:
                self._sessions[session.session_id] = session
                self._by_request[request_id] = session
            return Created(session, token, replayed=False)

    def get(self, session_id: str) -> Session:
        """Find a session.

        Raises:
            SessionNotFoundError: it does not exist, or its lease has run out.
        """
        session = self._sessions.get(session_id)
        if session is None or session.expired(self.clock()):
            raise session_not_found(session_id)
        return session

    def page(self, after: str, size: int) -> tuple[list[Session], str]:
        """Return sessions ordered by id and the token of the next page, empty on the last."""
        with self._lock:
            ids = sorted(self._sessions)
            first = bisect_right(ids, after)
            chosen = [self._sessions[session_id] for session_id in ids[first : first + size]]
        return chosen, chosen[-1].session_id if first + size < len(ids) else ""

    def delete(self, session_id: str, token: int = 0) -> Session:
        """End a session and free its memory; with a token, only if the client of the token still holds the worker.

        Raises:
            SessionNotFoundError: it does not exist.
            FencedError: another client holds the worker.
        """
        session = self.get(session_id)
        if token:
            session.ledger.worker.check_client(token)
        self._end([session])
        return session

    @contextlib.contextmanager
    def stream(self, cancel: Callable[[], object]) -> Iterator[ClientStream]:
        """Count a stream for a block; the sweep cancels it when it is silent where it must not be.

        A full server admits a few more, for clients that come back after their connection broke without the server's
        notice: see `require_room`.

        Raises:
            ResourceExhaustedError: the server has all the streams it takes.
        """
        stream = ClientStream(cancel, self.clock())
        with self._lock:
            stream.surplus = len(self._streams) >= self._max_streams
            if len(self._streams) >= self._max_streams + _RETURNING_STREAMS:
                raise self._too_many_streams()
            self._streams.add(stream)
        try:
            yield stream
        finally:
            with self._lock:
                self._streams.discard(stream)

    def require_room(self, stream: ClientStream, session: Session) -> None:
        """Refuse a stream beyond the limit, unless it displaces the stream of its session.

        Raises:
            ResourceExhaustedError: the server has all the streams it takes.
        """
        if stream.surplus and not session.ledger.worker.attached:
            raise self._too_many_streams()

    def _too_many_streams(self) -> ResourceExhaustedError:
        return ResourceExhaustedError(
            f"the server has {self._max_streams} attached streams, its most; detach some, or start it with a larger "
            "--max-streams",
            reason=Reason.TOO_MANY_STREAMS,
            metadata={"max_streams": self._max_streams},
            retry_after_seconds=1.0,
        )

    @contextlib.contextmanager
    def upload(self, cancel: Callable[[], object]) -> Iterator[Callable[[], bool]]:
        """Watch a load for a block; yields what to call, always true, with each message it brings.

        The sweep cancels a load that is silent: it holds memory, and a draining server waits for it. Loads are not
        counted as streams, or a server with as many clients as it takes would refuse every load.
        """
        stream = ClientStream(cancel, self.clock())
        stream.in_step = True

        def seen() -> bool:
            stream.last_seen = self.clock()
            return True

        with self._lock:
            self._uploads.add(stream)
        try:
            yield seen
        finally:
            with self._lock:
                self._uploads.discard(stream)

    def sweep(self) -> list[str]:
        """End expired sessions and cancel silent streams and loads; returns the ended ids."""
        now = self.clock()
        with self._lock:
            expired = [session for session in self._sessions.values() if session.expired(now)]
            silent = [
                stream for stream in self._streams | self._uploads if stream.overdue(now, self._step_idle_seconds)
            ]
        for stream in silent:
            stream.cancel()
        self._end(expired)
        return [session.session_id for session in expired]

    def cancel_streams(self) -> None:
        """End every attached stream that does not end by itself."""
        with self._lock:
            streams = [stream for stream in self._streams if not stream.ending]
        for stream in streams:
            stream.cancel()

    def close(self) -> None:
        """End every session. Closing twice is harmless."""
        self._end(self._present())

    def statistics(self) -> RegistryStatistics:
        """Tell what the registry is doing."""
        return RegistryStatistics(
            len(self._sessions), len(self._streams), self.pool.reserved_bytes, self.pool.limit_bytes
        )

    def _present(self) -> list[Session]:
        with self._lock:
            return list(self._sessions.values())

    def _made(self, config: SessionConfig, device: Device) -> Session:
        """Make a session on a device.

        Raises:
            ResourceExhaustedError: it does not fit; the message names the idle sessions of the device.
        """
        try:
            return Session(secrets.token_hex(16), config, device, epoch=1, clock=self.clock, sinks=self._sinks)
        except ResourceExhaustedError as error:
            beside = [session for session in self._present() if session.device == device.name]
            raise with_idle_sessions(error, beside, self.clock()) from None

    def _created_before(self, request_id: str, session: Session, config: SessionConfig) -> Created:
        if session.config != config:
            raise InvalidRequestError(
                f"request_id: {request_id!r} created another session before, with another config; use a new id",
                metadata={"field": "request_id"},
            )
        return Created(session, FIRST_GENERATION, replayed=True)

    def _end(self, sessions: list[Session]) -> None:
        with self._lock:
            for session in sessions:
                self._sessions.pop(session.session_id, None)
            ended = set(map(id, sessions))
            self._by_request = {
                request: session for request, session in self._by_request.items() if id(session) not in ended
            }
        with contextlib.ExitStack() as stack:  # a broken device keeps no other session from its end
            for session in reversed(sessions):
                stack.callback(session.close)
