"""The thread of a primary that brings sessions to the standby, names it a member, and compares digests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import msgspec
import structlog

from stepwire.errors import Reason, ResourceExhaustedError, StepwireError
from stepwire_server.replication.digests import digest_of
from stepwire_server.replication.joining import no_standby
from stepwire_server.replication.outbox import Subject
from stepwire_server.replication.primary import Primary
from stepwire_server.replication.records import BlockPlace, RecordKind, SessionOpening, numbers_of
from stepwire_server.replication.replica import Replica
from stepwire_server.sessions.redo import Codec
from stepwire_server.sessions.session import Session

__all__ = ["Upkeep"]

_log = structlog.get_logger()
_LOOK_SECONDS: Final = 1.0
_DIVERGED: Final = "its digest on the standby is another one"


class Upkeep:
    """Looks after the standby of a primary. Thread-safe."""

    def __init__(self, primary: Primary, codec: Codec, clock: Callable[[], float], digest_seconds: float) -> None:
        """Look after a primary; `clock` returns seconds, and digests are compared every `digest_seconds`."""
        self._primary, self._codec, self._clock, self._digest_seconds = primary, codec, clock, digest_seconds
        self._compared_at = clock()
        self._digests: dict[bytes, tuple[int, bytes]] = {}  # the newest of each session that one side has told
        self._looking = threading.Lock()
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="replication", daemon=True)
        primary.on_wake(self._wake.set)

    def start(self) -> None:
        """Look from now on."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. Closing twice is harmless."""
        self._ended = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    # --- the sessions of the registry --------------------------------------------------------------------

    def add(self, session: Session, request_id: str, *, fresh: bool) -> None:
        """Have the standby keep a new session; it has the session when this returns.

        Args:
            session: the session.
            request_id: the request that created it, with its tenant.
            fresh: it is as a new one of its config is.

        Raises:
            FencedError: NOT_PRIMARY.
            UnavailableError: NO_STANDBY; nothing was created.
            ResourceExhaustedError: the standby has no room for it; nothing was created.
        """
        self._primary.check()
        replica = self._primary.keep(session, request_id)
        try:
            if not self._primary.outbox.connected:
                return
            if fresh:
                with self._primary.outbox.changed:
                    replica.sent(self._open(replica, fresh=True))
            else:
                self._bring(replica)
            replica.wait(replica.synced or 0)
        except StepwireError:
            self._primary.remove(session.session_id)
            if replica.problem:
                raise ResourceExhaustedError(
                    f"the standby could not make the session: {replica.problem}; nothing was created",
                    reason=Reason.MEMORY_EXHAUSTED,
                ) from None
            raise

    def remove(self, session_id: str) -> None:
        """Have the standby forget a session that has ended."""
        self._primary.remove(session_id)

    # --- looking -----------------------------------------------------------------------------------------

    def look(self) -> None:
        """Do what is to be done: go on alone, bring sessions, name the member, compare digests."""
        with self._looking:
            self._primary.go_on_alone()
            now = self._clock()
            for replica in list(self._primary.replicas.values()):
                if self._primary.is_sending and replica.synced is None and now >= replica.retry_at:
                    self._try_to_bring(replica)
            self._primary.name_member()
            if now - self._compared_at >= self._digest_seconds:
                self.compare()

    def compare(self) -> None:
        """Ask the standby for the digest of each session that it has, and compare it when it comes."""
        self._compared_at = self._clock()
        with self._primary.outbox.changed:
            self._digests = {key: each for key, each in self._digests.items() if key in self._primary.replicas}
        for replica in list(self._primary.replicas.values()):
            if self._primary.is_sending and replica.synced is not None:
                try:
                    self._compare(replica)
                except StepwireError as error:  # it cannot be read just now: nothing is known against the standby
                    _log.warning("digests not compared", session_id=replica.session.session_id, problem=str(error))

    def digested(self, key: bytes, number: int, digest: bytes) -> None:
        """Note the digest of one side; the second one of a moment is compared with the first.

        One divergence is one, though digests of later moments are under way when it is found.
        """
        with self._primary.outbox.changed:
            if (replica := self._primary.replicas.get(key)) is None:
                return
            if replica.synced is None or number <= replica.synced:
                return  # it is of what the standby had before: it gets the session, or got it, whole since
            moment, other = self._digests.pop(key, (0, b""))
            if number != moment:
                self._digests[key] = max((number, digest), (moment, other))
                return
            if other == digest:
                return
            self._primary.divergences += 1
            replica.failed(_DIVERGED, self._clock())
            replica.retry_at = self._clock()
        _log.error("the standby has diverged; it gets the session whole", session_id=key.hex(), record=number)
        self._primary.wake()

    def problem(self, key: bytes, problem: str) -> None:
        """Note that the standby could not follow a session."""
        with self._primary.outbox.changed:
            if (replica := self._primary.replicas.get(key)) is not None:
                replica.failed(problem, self._clock())
        _log.error("the standby cannot follow a session", session_id=key.hex(), problem=problem)
        self._primary.wake()

    def _run(self) -> None:
        while not self._ended:
            self._wake.wait(_LOOK_SECONDS)
            self._wake.clear()
            if self._ended:
                return
            try:
                self.look()
            except Exception as error:  # the next look tries again, whatever it was, and the thread goes on
                _log.warning("the standby was not looked after", problem=str(error))

    def _try_to_bring(self, replica: Replica) -> None:
        try:
            self._bring(replica)
        except StepwireError as error:
            with self._primary.outbox.changed:
                replica.failed(str(error), self._clock())
                replica.problem = ""
            _log.warning("session not brought", session_id=replica.session.session_id, problem=str(error))

    def _open(self, replica: Replica, *, fresh: bool) -> int:
        session = replica.session
        opening = SessionOpening(
            request_id=replica.request_id,
            config=self._codec.encode_config(session.config),
            attach_key=session.ledger.members.tokens.key,
            fresh=fresh,
        )
        return self._primary.send(Subject(RecordKind.OPEN, replica.key), msgspec.msgpack.encode(opening))

    def _bring(self, replica: Replica) -> None:
        """Send a session whole, as of one moment, while steps go on.

        Raises:
            StepwireError: as `StateExchange.captured`, or the standby went meanwhile.
        """
        primary, outbox, missed = self._primary, self._primary.outbox, 0
        reader = outbox.reader

        def begin() -> None:
            nonlocal missed
            missed = replica.missed
            self._open(replica, fresh=False)
            primary.send(Subject(RecordKind.STATE, replica.key))

        with replica.session.exchange.captured(begin) as captured:
            for slot, start, values in captured.blocks:
                outbox.wait_for_room(values.nbytes, lambda: outbox.reader == reader)
                if outbox.reader != reader:
                    raise no_standby("the standby went while it got the session")
                meta = msgspec.msgpack.encode(BlockPlace(slot, start))
                primary.send(Subject(RecordKind.BLOCK, replica.key), meta, values.view("u1"))
        with outbox.changed:
            if outbox.reader == reader:
                meta = msgspec.msgpack.encode(numbers_of(captured))
                number = primary.send(Subject(RecordKind.STATE_END, replica.key), meta)
                if replica.missed == missed:
                    replica.sent(number)

    def _compare(self, replica: Replica) -> None:
        number = 0

        def begin() -> None:
            nonlocal number
            number = self._primary.send(Subject(RecordKind.DIGEST, replica.key))

        with replica.session.exchange.captured(begin) as captured:
            digest = digest_of(captured)
        self.digested(replica.key, number, digest)
