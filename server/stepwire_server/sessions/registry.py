"""All sessions of a server: create, find, list, end, and sweep away what nobody uses."""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence

import structlog

from stepwire.errors import DataLossError, ResourceExhaustedError, StepwireError
from stepwire_server.devices.pool import Device, DevicePool
from stepwire_server.durability.moved import MovedSessions
from stepwire_server.records.committed import CommitSink
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.session_statistics import RegistryStatistics
from stepwire_server.sessions.beginning import Beginning, Created
from stepwire_server.sessions.checkpointing import Saved
from stepwire_server.sessions.closing import closed_on_failure
from stepwire_server.sessions.data_directory import DataDirectory
from stepwire_server.sessions.idle import least_recently_used, with_idle_sessions
from stepwire_server.sessions.keeping import Replicas, keep, replicate
from stepwire_server.sessions.ledger import session_not_found
from stepwire_server.sessions.one_at_a_time import OneAtATime
from stepwire_server.sessions.parked import ParkedSession, compile_ahead, with_parked
from stepwire_server.sessions.refusals import another_config, too_many_sessions
from stepwire_server.sessions.registry_limits import RegistryLimits
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.step_rate import StepRates
from stepwire_server.sessions.streams import Streams
from stepwire_server.sessions.tenants import tenant_of
from stepwire_server.sessions.workers import FIRST_GENERATION

__all__ = ["Registry", "RegistryStatistics"]

_log = structlog.get_logger()


class Registry:
    """Owns the sessions. Thread-safe.

    Attributes:
        pool: the devices.
        clock: returns seconds.
        directory: the sessions on disk; None where all are in memory alone.
        replicas: the sessions that a standby has too; None where no server follows this one.
        epoch: the epoch of sessions.
        streams: the attached streams.
        limits: the limits of the server and of each tenant.
        moved: the sessions that live on elsewhere.
    """

    def __init__(
        self,
        pool: DevicePool,
        limits: RegistryLimits,
        clock: Callable[[], float],
        sinks: Sequence[CommitSink] = (),
    ) -> None:
        """Start without sessions; `sinks` are told of each commit."""
        self.directory: DataDirectory | None = None
        self.replicas: Replicas | None = None
        self.epoch = 1
        self.pool, self.clock = pool, clock
        self._sinks = tuple(sinks)
        self.limits = limits
        self._rates = StepRates(limits.tenant.steps_per_second)
        self._lock = threading.Lock()  # of the maps, for moments
        self._creation = threading.RLock()
        self._creators, self._making = OneAtATime(), set[str]()
        self._sessions: dict[str, Session] = {}
        self._by_request: dict[str, Session] = {}
        self.streams = Streams(limits, clock)
        self._parked: dict[str, str] = {}
        self.moved = MovedSessions()
        self._tenants: dict[str, str] = {}  # of sessions in memory and of parked ones

    def recover(self, directory: DataDirectory) -> None:
        """Bring the sessions of a data directory back, and keep durable ones there from now on.

        Raises:
            DataLossError: the log of the data directory is damaged, or cannot be read.
            OSError: the disk failed.
        """
        self.directory, self.epoch, self.moved = directory, directory.epoch, directory.own.moved
        for device in self.pool:
            device.budget.on_shortage(functools.partial(self._parked_one, device))
        for archived, session in directory.recover(self.remade):
            self.publish(archived.request_id, session)
        self._parked = {each.request_id: each.session_id for each in directory.parked()}
        self._tenants |= {session_id: tenant_of(name) for name, session_id in self._parked.items()}

    def create(self, request_id: str, config: SessionConfig, beginning: Beginning | None = None) -> Created:
        """Create a session, or return the one that this request created before.

        Args:
            request_id: the name of the request.
            config: the config.
            beginning: the state that it begins with; None for a session without parameters.

        Raises:
            InvalidRequestError: the request id came before with another config.
            UnsupportedFeatureError: the config names a device that the server does not have.
            ResourceExhaustedError: too many sessions, or no memory for this one.
            StepwireError: as `beginning.bring`.
        """
        # One creation of a tenant at a time: a repeated request would otherwise make two, and many would be beyond its
        # limits together. Making takes a while, so it is outside of the lock that others need.
        tenant, session_id = tenant_of(request_id), secrets.token_hex(16)
        with self._creators.of(tenant), contextlib.ExitStack() as place:
            if (known := self.created(request_id, config)) is not None:
                return known
            with self._creation:
                if len(self._sessions.keys() | self._making) >= self.limits.sessions and not self._parked_one():
                    raise too_many_sessions(self.limits.sessions, self.of(tenant), self.clock())
                device = self.pool.choose(config.device)
                self._making.add(session_id)
                place.callback(self._making.discard, session_id)
            with device.kernels.asked_by(tenant):
                session = self._made(session_id, config, device, tenant)
            with closed_on_failure(session):
                self.limits.tenant.check_session(session, self.of(tenant), self.clock())
                if beginning is not None:
                    beginning.bring(session)
            token = session.acquire().token
            replicate(session, request_id, beginning, self.replicas)  # may wait for the standby, so others need not
            with self._creation:
                keep(session, request_id, beginning, self.directory)
                self.publish(request_id, session)
            return Created(session, token, replayed=False)

    def created(self, request_id: str, config: SessionConfig | None = None) -> Created | None:
        """Return the session that a request created before; None if there is none.

        Raises:
            InvalidRequestError: it has another config than `config`.
            StepwireError: as `get`, if it is parked, or lives on elsewhere.
        """
        self._compile_ahead(self._parked.get(request_id))
        with self._creation:
            self.moved.check_request(request_id)
            known = self._by_request.get(request_id)
            if known is None and request_id in self._parked:
                known = self._revived(self._parked[request_id])
            if known is None or known.ledger.closed or self._is_over(known):
                return None
            if config is not None and known.config != config:
                raise another_config(request_id)
            return Created(known, known.ledger.members.tokens.token(0, FIRST_GENERATION), replayed=True)

    def get(self, session_id: str) -> Session:
        """Find a session; an id that nobody has is refused at once, whatever others create meanwhile.

        Raises:
            SessionNotFoundError, SessionMovedError: it does not exist, its lease has run out; it lives on elsewhere.
        """
        session = self._sessions.get(session_id)
        if session is None or session.ledger.closed:
            self.moved.check(session_id)
        if self.directory is not None and (session is None or session.ledger.closed) and self.directory.has(session_id):
            self._compile_ahead(session_id)
            with self._creation:
                session = self._sessions.get(session_id) or self._revived(session_id)
        if session is None or self._is_over(session):
            raise session_not_found(session_id)
        return session

    def _is_over(self, session: Session) -> bool:
        """Tell whether a session has ended by its lease; a durable one never does."""
        return not session.durable and session.expired(self.clock())

    def tenant_of(self, session_id: str) -> str | None:
        """Return the tenant of a session; None for an unknown one."""
        if (moved := self.moved.get(session_id)) is not None:
            return tenant_of(moved.request_id)
        return self._tenants.get(session_id)

    def ids_of(self, tenant: str) -> list[str]:
        """Return the ids of a tenant's sessions, of parked ones too."""
        with self._lock:
            return [each for each, owner in self._tenants.items() if owner == tenant]

    def page(self, after: str, size: int, tenant: str | None = None) -> tuple[list[Session | ParkedSession], str]:
        """Return sessions of a tenant ordered by id, and the token of the next page, empty on the last; None: all."""
        with self._lock:
            present, tenants = dict(self._sessions), dict(self._tenants)
        ids = sorted(session_id for session_id, owner in tenants.items() if tenant in (None, owner))
        first = bisect_right(ids, after)
        chosen = ids[first : first + size]
        return with_parked(self.directory, chosen, present), chosen[-1] if first + size < len(ids) else ""

    def delete(self, session_id: str, token: int = 0, departed: Session | None = None) -> int:
        """End a session and free its memory; with a token, only if the client of the token still holds the worker.

        A `departed` session has ended already, and its record tells where it lives on.

        Returns:
            The number of its last step; 0 for one that cannot be brought back from the disk.

        Raises:
            SessionNotFoundError: it does not exist.
            FencedError: another client holds the worker, or another server owns the data directory.
        """
        self._compile_ahead(session_id)
        with self._creation:
            session = departed or self._to_delete(session_id, token)
            if self.directory is not None and (session is None or session.durable):
                self.directory.remove(session_id)
                if session is not None:
                    self.directory.forget(session)
                self._parked = {name: parked for name, parked in self._parked.items() if parked != session_id}
        if session is None:
            self._tenants.pop(session_id, None)
            return 0
        self._gone([session])
        return session.ledger.applied_step

    def _to_delete(self, session_id: str, token: int) -> Session | None:
        """Return a session; None for one on disk that cannot be brought back, and that its caller deletes all the same.

        Raises:
            StepwireError: as `get`, or the token is of a client that has lost the worker.
        """
        try:
            session = self.get(session_id)
        except (DataLossError, ResourceExhaustedError):
            if token:  # nobody can tell whether it still holds the worker
                raise
            return None
        if token:
            session.ledger.worker.check_client(token)
        return session

    def sweep(self) -> list[str]:
        """End expired sessions and cancel silent streams and loads; returns the ended ids."""
        now = self.clock()
        present = self._present()
        expired = [session for session in present if session.expired(now)]
        self.streams.cancel_silent(now)
        for session in present:
            session.let_go()
        self._gone([session for session in expired if not session.durable])
        for session in present:  # a half-applied step whose client is gone keeps the log
            half = session.unfinished_step and (session.idle_seconds(now) or 0.0) > self.limits.idle_seconds
            if session.durable and (half or session in expired):
                self.park(session)
        return [session.session_id for session in expired]

    def park(self, session: Session) -> bool:
        """Checkpoint a session that nobody uses, and free its memory; its next call brings it back.

        Returns:
            False if it is in use, or could not be checkpointed: it stays.
        """
        assert self.directory is not None
        with self._creation:
            if session.idle_seconds(self.clock()) is None or session.ledger.closed:
                return False
            whole = self._without_half(session)
            saved = None if whole is None else self._checkpointed(whole)
            if whole is None or saved is None or not whole.passage.retire(*saved):
                return False
            self.directory.forget(whole)
            self._leave(whole)
        return True

    def _leave(self, session: Session) -> None:
        """Note that a session is on disk alone."""
        with self._lock:
            self._parked |= {name: each.session_id for name, each in self._by_request.items() if each is session}
        self._end([session])

    def _without_half(self, session: Session) -> Session | None:
        """Bring a session back without its half-applied step, whose client is gone; None where the disk lacks others.

        A session without such a step is returned as it is.
        """
        assert self.directory is not None
        if not session.unfinished_step:
            return session
        with self._creation:
            try:
                if not self.directory.drop_half(session):
                    return None if session.unfinished_step else session
                self._leave(session)
                return self._revived(session.session_id)
            except (StepwireError, OSError) as error:
                _log.error("half step not dropped", session_id=session.session_id, problem=str(error))
                return None

    def checkpoint_all(self) -> bool:
        """Checkpoint every durable session: the server ends. Return False if one could not be, which is logged."""
        complete = True
        for session in self._present():
            if session.durable and session.has_state:
                complete &= self._checkpointed(self._without_half(session) or session) is not None
        return complete

    def _checkpointed(self, session: Session) -> Saved | None:
        assert self.directory is not None
        try:
            return self.directory.checkpointer.checkpoint(session)
        except (StepwireError, OSError) as error:
            _log.error("checkpoint failed", session_id=session.session_id, problem=str(error))
            return None

    def end_waits(self, error: StepwireError) -> None:
        """Have no worker wait for others from now on."""
        for session in self._present():
            session.end_waits(error)

    def close(self) -> None:
        """End every session. Closing twice is harmless."""
        self._end(self._present())

    def statistics(self) -> RegistryStatistics:
        """Tell what the registry is doing."""
        pool, parked = self.pool, len(set(self._parked.values()).difference(list(self._sessions)))
        return RegistryStatistics(len(self._sessions), len(self.streams), pool.reserved_bytes, pool.limit_bytes, parked)

    def of(self, tenant: str | None) -> list[Session]:
        """Return the sessions of a tenant in memory; None: of all."""
        return [session for session in self._present() if tenant in (None, session.tenant)]

    def _present(self) -> list[Session]:
        with self._lock:
            return list(self._sessions.values())

    def publish(self, request_id: str, session: Session) -> None:
        """Serve a session from now on: a new one, one brought back, or one that has followed another server's."""
        with self._lock:
            session.give_to(tenant_of(request_id), self._rates.of(tenant_of(request_id), self.clock()))
            self._sessions[session.session_id], session.request_id = session, request_id
            self._tenants[session.session_id] = session.tenant
            self._by_request[request_id] = session

    def _revived(self, session_id: str) -> Session:
        """Bring a parked session back, and park others where there is no room for it.

        Raises:
            SessionNotFoundError, ResourceExhaustedError, DataLossError: as `DataDirectory.revive`.
        """
        assert self.directory is not None
        if not self.directory.has(session_id):
            raise session_not_found(session_id)
        if len(self._sessions) >= self.limits.sessions and not self._parked_one():
            raise too_many_sessions(self.limits.sessions, self.of(self.tenant_of(session_id) or ""), self.clock())
        archived, session = self.directory.revive(session_id, self.remade)
        self.publish(archived.request_id, session)
        _log.info("session revived", session_id=session_id, step=session.ledger.applied_step)
        return session

    def _compile_ahead(self, session_id: str | None) -> None:
        """Compile what a session on disk alone needs: others need the lock under which it comes back."""
        if self.directory is not None and session_id is not None and session_id not in self._sessions:
            compile_ahead(self.directory, session_id, self.pool, self.tenant_of(session_id) or "")

    def remade(self, session_id: str, config: SessionConfig) -> Session:
        """Make a session that the data directory has, on a device that this server has."""
        return self._made(session_id, config, self.pool.choose_like(config.device), self.tenant_of(session_id) or "")

    def _parked_one(self, device: Device | None = None) -> bool:
        """Make room: park the least recently used durable session, of a device. Return False if none is idle."""
        there = [each for each in self._present() if device is None or each.device == device.name]
        return any(self.park(session) for session in least_recently_used(there, self.clock()))

    def _made(self, session_id: str, config: SessionConfig, device: Device, tenant: str) -> Session:
        """Make a session of a tenant on a device.

        Raises:
            ResourceExhaustedError: it does not fit; the message names the idle sessions of the device.
        """
        try:
            return Session(session_id, config, device, epoch=self.epoch, clock=self.clock, sinks=self._sinks)
        except ResourceExhaustedError as error:
            beside = [session for session in self.of(tenant) if session.device == device.name]
            raise with_idle_sessions(error, beside, self.clock()) from None

    def _gone(self, sessions: list[Session]) -> None:
        """End sessions for good, on the standby too."""
        self._end(sessions)
        for session in sessions:
            self._tenants.pop(session.session_id, None)
            if self.replicas is not None:
                self.replicas.remove(session.session_id)

    def _end(self, sessions: list[Session]) -> None:
        with self._lock:
            for session in sessions:
                self._sessions.pop(session.session_id, None)
            ended = set(map(id, sessions))
            self._by_request = {name: each for name, each in self._by_request.items() if id(each) not in ended}
        with contextlib.ExitStack() as stack:  # a broken device keeps no other session from its end
            for session in reversed(sessions):
                stack.callback(session.close)
