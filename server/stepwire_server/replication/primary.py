"""A primary: its standby, the epoch that it speaks in, and the sessions that the standby has to have.

A standby that comes gets all sessions whole, and is then named a member: from there on its acknowledgements count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

import structlog

from stepwire.errors import FencedError, Reason, StepwireError
from stepwire_server.durability.session_log import SessionLog
from stepwire_server.engines.protocol import HostArray
from stepwire_server.replication.claims import Claim, Claims
from stepwire_server.replication.joining import Joining, Opened, no_standby
from stepwire_server.replication.outbox import NOTHING, Outbox, Subject
from stepwire_server.replication.records import RecordKind
from stepwire_server.replication.replica import Replica
from stepwire_server.replication.status import ReplicationStatus
from stepwire_server.sessions.session import Session

__all__ = ["Primary"]

_log = structlog.get_logger()

_PATIENCE_SECONDS: Final = 5.0
"""The time that a standby may be away before a primary claims to go on alone, and may need to forget a session."""


class Primary:
    """The primary's side of replication. Thread-safe.

    Attributes:
        server_id: the id of this process.
        epoch: the epoch of its sessions.
        outbox: the records.
        replicas: the replicated sessions, by the 16 bytes of their ids.
        alone: it speaks for its sessions without a standby.
        deposed: a standby was promoted, or another server has claimed the sessions.
        member_since: the record from which on the acknowledgements of the standby count; 0 for none.
        standby_id: the standby that may be promoted, or that is on the way to that; empty for none.
        divergences: how often a digest of the standby was another one.
    """

    def __init__(
        self,
        server_id: str,
        claim: Claim,
        claims: Claims | None,
        clock: Callable[[], float],
        *,
        alone: bool,
        returns_alone: bool,
    ) -> None:
        """Speak from a claim on.

        Args:
            server_id: the id of this process.
            claim: the newest claim, which is this server's.
            claims: the claims of the shard; None where no directory has them.
            clock: returns seconds.
            alone: it begins without a standby, and serves all the same.
            returns_alone: it claims to go on alone when its standby is gone.
        """
        self.server_id, self.epoch, self.alone = server_id, claim.epoch, alone
        self.outbox = Outbox()
        self.replicas: dict[bytes, Replica] = {}
        self.deposed, self.member_since = False, 0
        self.standby_id = ""
        self.divergences = 0
        self._claim, self._claims, self._clock, self._returns_alone = claim, claims, clock, returns_alone
        self._lost_at: float | None = None
        self._newer_epoch = 0
        self._entries = itertools.count(1)
        self._wakes: list[Callable[[], object]] = []

    # --- what sessions ask -------------------------------------------------------------------------------

    @property
    def is_sending(self) -> bool:
        """A standby reads records, and its acknowledgements make room."""
        return self.outbox.connected and not self.deposed

    @property
    def is_member(self) -> bool:
        """The acknowledgements of the standby count, and it knows that."""
        return 0 < self.member_since <= self.outbox.acknowledged

    def check(self) -> None:
        """Refuse what could not be acknowledged just now.

        Raises:
            FencedError: NOT_PRIMARY.
            UnavailableError: NO_STANDBY.
        """
        self.check_deposed()
        if not self.alone and not (self.outbox.connected and self.member_since):
            raise no_standby("none follows this server just now")

    def check_deposed(self) -> None:
        """Refuse everything once another server speaks for the sessions.

        Raises:
            FencedError: NOT_PRIMARY.
        """
        if self.deposed:
            raise FencedError(
                f"another server speaks for the sessions since epoch {self._newer_epoch}, and this one is of epoch "
                f"{self.epoch}; attach to the newer server",
                reason=Reason.NOT_PRIMARY,
                metadata={"epoch": self._newer_epoch},
            )

    def is_owner(self) -> bool:
        """Ask the standby, or the claims, whether this server still speaks for its sessions; True if it does.

        Raises:
            FencedError, UnavailableError: as `check`.
        """
        if self.alone:
            self._look_at_claims()
            return True
        self.check()
        number = self.send(Subject(RecordKind.LOOK))
        with self.outbox.changed:
            while self.outbox.acknowledged < number and not self.alone:
                self.check()
                self.outbox.changed.wait()
            self.check_deposed()
        return True

    def told(self, error: StepwireError) -> StepwireError:
        """Return the error that may be told in the place of one of a session's state, which may have gone on elsewhere.

        The caller waits for the standby.
        """
        try:
            self.check()
            self.is_owner()
        except StepwireError as refusal:
            return refusal
        return error

    def send(self, subject: Subject, meta: bytes = b"", payload: HostArray = NOTHING) -> int:
        """Send a record, and return its number; without anybody to read it, it is numbered alone."""
        with self.outbox.changed:
            number = self.outbox.append(self._claim.epoch, subject, meta, payload)
            if (self.alone or self.deposed) and not self.outbox.connected:
                self.outbox.clear()
            elif self.alone and self.outbox.is_full:  # commits are waited for by nobody yet
                _log.warning("the standby is too slow, and begins anew", standby=self.standby_id)
                self._forget()
            return number

    def keep(self, session: Session, request_id: str) -> Replica:
        """Have a session's records sent from now on; the caller sends the session itself."""
        replica = Replica(self, session, request_id)
        with self.outbox.changed:
            self.check_deposed()
            self.replicas[replica.key] = replica
        log = SessionLog(replica, session.session_id, self._entries, self.is_owner)
        session.progress.attach(log, lambda: None, journals=True)
        return replica

    def remove(self, session_id: str) -> None:
        """Have the standby forget a session that has ended, and wait for that a while, as long as it is there."""
        key, outbox = bytes.fromhex(session_id), self.outbox
        with outbox.changed:
            if self.replicas.pop(key, None) is None or self.deposed:
                return
            number = self.send(Subject(RecordKind.CLOSE, key))
            outbox.changed.wait_for(lambda: outbox.acknowledged >= number or not outbox.connected, _PATIENCE_SECONDS)

    # --- the standby -------------------------------------------------------------------------------------

    def join(self, joining: Joining) -> Opened:
        """Accept a standby, or hear from one that was promoted.

        Raises:
            FencedError: NOT_PRIMARY, another server speaks for the sessions; or STALE_EPOCH, the standby is another
                server's, or this one has another standby.
        """
        with self.outbox.changed:
            if joining.promoted_epoch > self.epoch and (self._claims is None or self._newer_claim() is not None):
                self.depose(joining.promoted_epoch)
            self.check_deposed()
            self._check_joining(joining)
            goes_on = (
                joining.standby_id == self.standby_id
                and joining.primary_id == self.server_id
                and self.outbox.has_from(joining.received + 1)
                and not self.alone
            )
            if goes_on:
                self.outbox.acknowledge(joining.received)
                after = joining.received
            else:
                self.outbox.clear()
                self.member_since, after = 0, self.outbox.position
                for replica in self.replicas.values():
                    replica.synced, replica.retry_at = None, 0.0
            self.standby_id, self._lost_at = joining.standby_id, None
            _log.info("standby follows", standby=joining.standby_id, whole=not goes_on)
            opened = Opened(self.outbox.connect(), after, not goes_on)
        self.wake()
        return opened

    def left(self, reader: int) -> None:
        """Note that the stream of a standby has ended: it may come back."""
        with self.outbox.changed:
            if self.outbox.disconnect(reader):
                self._lost_at = self._clock()
                _log.warning("standby lost", standby=self.standby_id)
        self.wake()

    def leave(self, reader: int) -> None:
        """Note that a standby ends for good, and is not to be promoted."""
        with self.outbox.changed:
            if self.outbox.reader == reader:
                self._forget()
        self.wake()

    def forget_standby(self) -> str:
        """Have another standby accepted in the place of the one that is known; return the id of that one."""
        with self.outbox.changed:
            self.check_deposed()
            known = self.standby_id
            self._forget()
        self.wake()
        return known

    def depose(self, epoch: int) -> None:
        """Speak no more: another server does, from an epoch on."""
        with self.outbox.changed:
            if not self.deposed:
                self.deposed, self.alone, self.member_since, self._newer_epoch = True, False, 0, epoch
                self.outbox.reader = 0
                self.outbox.clear()
                _log.error("another server speaks for the sessions now", epoch=epoch, own_epoch=self.epoch)
        self.wake()

    def refused(self, reader: int, epoch: int) -> None:
        """Note that the standby refuses the records of this server."""
        if self.outbox.reader == reader:
            self.depose(epoch)

    def hand_over(self, seconds: float) -> bool:
        """Have the standby promoted in this server's place, which takes no steps any more; return True if it was told.

        Args:
            seconds: the longest wait for the standby.
        """
        with self.outbox.changed:
            lacking = any(replica.synced is None for replica in self.replicas.values())
            if self.deposed or lacking or not (self.is_member and self.outbox.connected):
                return False
            number, reader = self.send(Subject(RecordKind.HANDOVER)), self.outbox.reader
            self.outbox.changed.wait_for(
                lambda: self.outbox.acknowledged >= number or self.outbox.reader != reader, seconds
            )
            told = self.outbox.acknowledged >= number
            if told:
                self.depose(self._claim.epoch + 1)
            return told

    # --- claims ------------------------------------------------------------------------------------------

    def name_member(self) -> None:
        """Have the acknowledgements of the standby count, once it has all sessions whole; it is told so.

        From that record on nothing is acknowledged alone, since the standby may be promoted once it has the record.

        Raises:
            OSError: the claims cannot be written.
        """
        with self.outbox.changed:
            standby, reader = self.standby_id, self.outbox.reader
            whole = all(each.synced is not None or each.problem for each in self.replicas.values())
            if self.deposed or not reader or self.member_since or not whole:
                return
        if not self._claimed(standby):
            return
        with self.outbox.changed:
            if self.outbox.reader == reader and not self.deposed:
                self.member_since, self.alone = self.send(Subject(RecordKind.MEMBER)), False
                _log.info("standby named", standby=standby, epoch=self._claim.epoch)

    def go_on_alone(self) -> None:
        """Claim to go on without the standby, where that is the setting and it was away for too long.

        Raises:
            OSError: the claims cannot be written.
        """
        with self.outbox.changed:
            gone = self._lost_at is not None and self._clock() - self._lost_at >= _PATIENCE_SECONDS
            alone_before = self.alone or self.deposed or self.outbox.connected
            untold = self._claims is None and self.member_since  # it might be promoted, and nobody would know
            if alone_before or untold or not self._returns_alone or not (gone or not self.standby_id):
                return
        if not self._claimed(""):
            return
        with self.outbox.changed:
            self.outbox.changed.notify_all()
            if self.outbox.connected:  # it came back meanwhile, and no claim names it: it has to be named again
                self.member_since = 0
            elif not self.deposed:
                self._forget()
                self.alone = True
                _log.warning("going on without a standby", epoch=self._claim.epoch)

    def release(self) -> None:
        """Say that nobody speaks for the sessions any more: they have ended with this server."""
        if self._claims is not None and not self.deposed and not self.member_since:
            self._claims.release(self._claim.epoch)

    def _claimed(self, standby: str) -> bool:
        """Claim the next epoch for this server and a standby; a failure deposes it."""
        wanted = self._claim._replace(epoch=self._claim.epoch + 1, standby=standby)
        if self._claims is not None and not self._claims.make(wanted):
            self.depose(self._claims.newest().epoch)
            return False
        with self.outbox.changed:
            self._claim = wanted
        return True

    def _look_at_claims(self) -> None:
        """Depose this server if another one has claimed the sessions.

        Raises:
            FencedError: NOT_PRIMARY.
        """
        if (newer := self._newer_claim()) is not None:
            self.depose(newer.epoch)
        self.check_deposed()

    def _newer_claim(self) -> Claim | None:
        """Return the claim by which another server speaks for the sessions; None without one."""
        newest = self._claim if self._claims is None else self._claims.newest()
        return newest if newest.epoch > self._claim.epoch and newest.server != self.server_id else None

    def _check_joining(self, joining: Joining) -> None:
        if joining.primary_id not in ("", self.server_id):
            raise FencedError(
                "the standby has the sessions of another primary, and this server does not: promote the standby, or "
                "start it anew to give them up",
                reason=Reason.STALE_EPOCH,
                metadata={"epoch": self.epoch},
            )
        other = joining.standby_id != self.standby_id and self.standby_id
        if other and (self.outbox.connected or (self._claims is None and self.member_since)):
            raise FencedError(
                f"this server has the standby {self.standby_id}, which may be promoted; if it is gone for good, say so "
                "by `stepwire standby forget`",
                reason=Reason.STALE_EPOCH,
                metadata={"epoch": self.epoch},
            )

    def _forget(self) -> None:
        self.outbox.reader = 0
        self.outbox.clear()
        self.standby_id, self.member_since, self._lost_at = "", 0, None
        for replica in self.replicas.values():
            replica.synced = None

    def on_wake(self, wake: Callable[[], object]) -> None:
        """Call a function when there is something to look after."""
        self._wakes.append(wake)

    def wake(self) -> None:
        """Have somebody look: a standby came or went, or lacks a session."""
        for wake in self._wakes:
            wake()

    @property
    def problem(self) -> str:
        """The reason why this server serves no sessions; empty where it does."""
        return f"another server speaks for the sessions since epoch {self._newer_epoch}" if self.deposed else ""

    def status(self) -> ReplicationStatus:
        """Return how replication stands."""
        with self.outbox.changed:
            lacking = sum(replica.synced is None for replica in self.replicas.values())
            status = ReplicationStatus(
                role="deposed" if self.deposed else "primary",
                epoch=self._claim.epoch,
                server_id=self.server_id,
                peer_id=self.standby_id,
                connected=self.outbox.connected,
                in_sync=self.is_member and not lacking,
                sessions=len(self.replicas),
                incomplete=lacking if self.outbox.connected else 0,
                divergences=self.divergences,
                problem=self.problem,
            )
            return self.outbox.counted(status)
