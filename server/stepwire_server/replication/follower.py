"""A standby: it admits the records of its primary in their order, follows them, and is promoted in the primary's place.

Admitted records are followed by a thread of their own, and acknowledged before. A record that needs memory, or that an
acknowledgement has to prove more of, is followed first: the creation of a session, its state, a membership.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec
import structlog

from stepwire.errors import FencedError, InvalidRequestError, Reason, SessionNotReadyError, UnavailableError
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.replication.claims import Claim, Claims
from stepwire_server.replication.records import RecordKind, ReplicationRecord, SessionOpening
from stepwire_server.replication.replicated_session import ReplicatedSession, received
from stepwire_server.replication.status import ReplicationStatus
from stepwire_server.sessions.redo import ChunkRecords, Codec
from stepwire_server.sessions.session import Session

__all__ = ["Follower", "Heard"]

_log = structlog.get_logger()

_MOST_BYTES: Final = 256 << 20
_FOLLOWED_FIRST: Final = frozenset(
    {
        RecordKind.OPEN,
        RecordKind.STATE,
        RecordKind.BLOCK,
        RecordKind.STATE_END,
        RecordKind.MEMBER,
        RecordKind.HANDOVER,
    }
)

Make = Callable[[str, SessionConfig], Session]


class Heard(NamedTuple):
    """The functions by which a standby is heard by its primary.

    Attributes:
        digest: tells the digest of a session, as of a record.
        problem: tells that a session could not be followed, and why.
    """

    digest: Callable[[bytes, int, bytes], object]
    problem: Callable[[bytes, int, str], object]


class Follower:
    """The standby's side of replication. Thread-safe.

    Attributes:
        server_id: the id of this process.
        primary_id: the primary whose sessions it has; empty before the first.
        received: the number of the last record that was admitted.
        epoch: the newest epoch of the primary that it knows.
        is_member: it was told that its acknowledgements count, so it has every acknowledged step.
        handed_over: the primary has ended, and wants it to be promoted.
        promoted: it is the primary.
    """

    def __init__(self, server_id: str, codec: Codec, make: Make, claims: Claims | None) -> None:
        """Follow nobody yet.

        Args:
            server_id: the id of this process.
            codec: the contract's messages.
            make: makes a session of an id, at step 0.
            claims: the claims of the shard; None where no directory has them.
        """
        self.server_id, self._codec, self._make, self._claims = server_id, codec, make, claims
        self.primary_id = ""
        self.received = self.epoch = self._followed = self._bytes = self._admitted_steps = 0
        self.is_member = self.handed_over = self.promoted = False
        self._is_deciding = self._leaving = self._ended = self.connected = False
        self._sessions: dict[bytes, ReplicatedSession] = {}
        self._lost: dict[bytes, str] = {}
        self._chunks: dict[bytes, ChunkRecords] = {}
        self._changed = threading.Condition()
        self._queue: deque[ReplicationRecord] = deque()
        self.heard = Heard(lambda key, number, digest: None, lambda key, number, problem: None)
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)

    def start(self) -> None:
        """Follow admitted records from now on."""
        self._thread.start()

    def close(self) -> None:
        """End, and free the sessions that were not promoted. Closing twice is harmless."""
        with self._changed:
            self._ended = self._leaving = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        for each in [] if self.promoted else self._sessions.values():
            each.close()

    # --- the stream --------------------------------------------------------------------------------------

    def begin(self, primary_id: str, epoch: int, *, whole: bool) -> None:
        """Begin with a primary, or go on with it.

        Args:
            primary_id: the id of its process.
            epoch: its epoch.
            whole: all sessions follow whole, and those that are here are dropped.

        Raises:
            FencedError: this server has been promoted.
            UnavailableError: this server ends.
        """
        with self._changed:
            self._await_role()
            self.connected = True
            if not whole:
                self.epoch = max(self.epoch, epoch)
                for key, problem in self._lost.items():  # told again: the last message may have been lost
                    self.heard.problem(key, self.received, problem)
                return
            self._changed.wait_for(lambda: not self._queue)
            self._await_role()
            dropped = [*self._sessions.values()]
            self._sessions, self._chunks, self._lost = {}, {}, {}
            self.primary_id, self.epoch, self.received, self.is_member = primary_id, epoch, 0, False
        for each in dropped:
            each.close()

    def admit(self, record: ReplicationRecord) -> None:
        """Admit the next record: when this returns, it may be acknowledged.

        A promotion that is under way is waited for: it may fail, and the record counts then.

        Raises:
            FencedError: NOT_PRIMARY, this server was promoted; or STALE_EPOCH, the record is of an older primary.
            UnavailableError: this server ends.
            InvalidRequestError: a record is missing before this one.
        """
        with self._changed:
            self._await_role()
            self._check_order(record)
            first = record.kind in _FOLLOWED_FIRST
            self._changed.wait_for(lambda: not self._queue if first else self._bytes < _MOST_BYTES)
            self._await_role()
            self._queue.append(record)
            self._bytes += record.nbytes
            self._changed.notify_all()
            if first:
                self._changed.wait_for(lambda: not self._queue or self._ended)
            self.received, self.epoch = record.number, record.epoch
            self._admitted_steps += record.kind is RecordKind.COMMIT

    def lost(self) -> None:
        """Note that the connection is gone."""
        with self._changed:
            self.connected = False

    def leave(self) -> None:
        """Be promoted no more: this server ends, and its primary is told so next."""
        with self._changed:
            self.is_member = False
            self._leaving = True

    # --- promotion ---------------------------------------------------------------------------------------

    def promote(self, endpoint: str, *, lossy: bool = False) -> Claim:
        """Claim the next epoch, and return the claim. No record is admitted meanwhile, nor ever after.

        Args:
            endpoint: the address of this server for clients.
            lossy: promote it though it lacks sessions, which are lost then.

        Raises:
            SessionNotReadyError: it lacks sessions, or its acknowledgements never counted; it goes on as it was.
            FencedError: NOT_PRIMARY, the claims do not name it; it goes on as it was.
            OSError: the claims cannot be written; it goes on as it was.
        """
        with self._changed:
            if self.promoted:
                return Claim(self.epoch, self.server_id, "", endpoint)
            self._is_deciding = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._queue)
                self._check_whole(lossy)
            claim = self._claimed(endpoint, lossy)
            with self._changed:
                self.promoted, self.epoch = True, claim.epoch
        finally:
            with self._changed:
                self._is_deciding = False
                self._changed.notify_all()
        for each in self._sessions.values():
            if each.whole:
                each.session.lead(claim.epoch)
            else:
                each.close()
        return claim

    def sessions(self) -> list[ReplicatedSession]:
        """Return the sessions that are whole; once this server is promoted they are the registry's."""
        return [each for each in self._sessions.values() if each.whole]

    def status(self) -> ReplicationStatus:
        """Return how replication stands."""
        with self._changed:
            return ReplicationStatus(
                role="standby",
                epoch=self.epoch,
                server_id=self.server_id,
                peer_id=self.primary_id,
                connected=self.connected,
                in_sync=self.is_member and not self._lacking(),
                position=self._followed,
                acknowledged=self.received,
                sessions=len(self._sessions),
                incomplete=len(self._lacking()),
                problem="this server is a standby; promote it, or use its primary",
                pending_steps=sum(record.kind is RecordKind.COMMIT for record in self._queue),
                pending_bytes=self._bytes,
                acknowledged_steps=self._admitted_steps,
            )

    def _claimed(self, endpoint: str, lossy: bool) -> Claim:
        if self._claims is None:
            return Claim(self.epoch + 1, self.server_id, "", endpoint)
        newest = self._claims.newest()
        claim = Claim(newest.epoch + 1, self.server_id, "", endpoint)
        named = newest.standby == self.server_id or (lossy and newest.server == self.primary_id)
        if not named or not self._claims.make(claim):
            raise FencedError(
                f"the newest claim, of epoch {newest.epoch}, does not name this standby: its primary went on without it"
                ", or another server was promoted; it cannot be promoted",
                reason=Reason.NOT_PRIMARY,
                metadata={"epoch": newest.epoch},
            )
        return claim

    def _check_whole(self, lossy: bool) -> None:
        lacking = self._lacking()
        if lossy or (self.is_member and not lacking):
            return
        what = f"it lacks {len(lacking)} sessions" if self.is_member else "it never had all sessions of its primary"
        raise SessionNotReadyError(
            f"this standby may lack acknowledged steps: {what}; let it follow, or promote it with --lossy, which gives "
            "them up",
            metadata={"sessions": len(lacking)},
        )

    def _lacking(self) -> list[bytes]:
        return [key for key, each in self._sessions.items() if not each.whole] + list(self._lost)

    def _await_role(self) -> None:
        """Wait until no promotion is under way, and refuse to follow where this server is no standby any more."""
        self._changed.wait_for(lambda: not self._is_deciding)
        if self.promoted:
            raise FencedError(
                "this server follows no more: it is the primary",
                reason=Reason.NOT_PRIMARY,
                metadata={"epoch": self.epoch},
            )
        if self._leaving:
            raise UnavailableError("this standby ends, and follows no more", reason=Reason.SHUTTING_DOWN)

    def _check_order(self, record: ReplicationRecord) -> None:
        if record.epoch < self.epoch:
            raise FencedError(
                f"record {record.number} is of epoch {record.epoch}, and this standby knows epoch {self.epoch}",
                reason=Reason.STALE_EPOCH,
                metadata={"epoch": self.epoch},
            )
        if self.received and record.number != self.received + 1:
            raise InvalidRequestError.of(
                "record.number",
                f"{record.number} came behind {self.received}; follow again",
                reason=Reason.INVALID_FRAME,
            )

    # --- following ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ended)
                if not self._queue:
                    return
                record = self._queue[0]
            try:
                self._follow(record)
            except Exception as error:  # a bug, or a broken device: the session is given up, and its primary is told
                self._give_up(record, str(error))
            with self._changed:
                self._queue.popleft()
                self._bytes -= record.nbytes
                self._followed = record.number
                self._changed.notify_all()

    def _follow(self, record: ReplicationRecord) -> None:
        key = record.session
        if record.kind is RecordKind.MEMBER:
            self.is_member = True
        elif record.kind is RecordKind.HANDOVER:
            self.handed_over = True
        elif record.kind is RecordKind.OPEN:
            self._open(key, msgspec.msgpack.decode(record.meta, type=SessionOpening))
        elif record.kind is RecordKind.CLOSE:
            self._lost.pop(key, None)
            self._chunks.pop(key, None)
            if (closed := self._sessions.pop(key, None)) is not None:
                closed.close()
        elif record.kind is RecordKind.DIGEST:
            if (present := self._sessions.get(key)) is not None:
                self.heard.digest(key, record.number, present.digest())
        elif (present := self._sessions.get(key)) is not None:
            present.add(record)
        elif record.kind is RecordKind.CHUNK:  # the session follows whole, and this chunk's commit behind it
            self._chunks.setdefault(key, {}).setdefault((0, record.entry), []).append(received(record))
        elif record.kind in (RecordKind.COMMIT, RecordKind.LOAD, RecordKind.DROP) and key in self._chunks:
            self._chunks[key].pop((0, record.entry), None)

    def _open(self, key: bytes, opening: SessionOpening) -> None:
        former = self._sessions.pop(key, None)
        chunks = self._chunks.pop(key, {}) if former is None else former.chunks
        if former is not None:
            former.close()
        session = self._make(key.hex(), self._codec.decode_config(opening.config))
        self._sessions[key] = ReplicatedSession(session, opening, self._codec, chunks)
        self._lost.pop(key, None)

    def _give_up(self, record: ReplicationRecord, problem: str) -> None:
        key = record.session
        _log.error("session not followed", session_id=key.hex(), record=record.number, problem=problem)
        self._lost[key] = problem
        if (broken := self._sessions.pop(key, None)) is not None:
            broken.close()
        self.heard.problem(key, record.number, problem)
