"""One session of a primary, and what its standby has of it: the place of the session's records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stepwire_server.durability.records import Kind, LogPosition, Record, as_array
from stepwire_server.replication.joining import no_standby
from stepwire_server.replication.outbox import Outbox, Subject
from stepwire_server.replication.records import RecordKind
from stepwire_server.sessions.session import Session

if TYPE_CHECKING:
    from stepwire_server.replication.primary import Primary

__all__ = ["Replica"]

_FIRST_RETRY_SECONDS: Final = 1.0
_MOST_RETRY_SECONDS: Final = 60.0


class Replica:
    """The records of one session; see `RecordWriter`. Thread-safe.

    Attributes:
        session: the session.
        request_id: the request that created it, with its tenant.
        synced: the number of the record behind which the standby has the session whole; None while it has not.
        problem: the reason why the standby could not follow it last; empty without one.
        retry_at: the clock reading before which no further attempt is made.
        missed: how many commits the standby never got, because it came while their chunks arrived.
    """

    def __init__(self, primary: Primary, session: Session, request_id: str) -> None:
        """Be known to no standby yet."""
        self.session, self.request_id = session, request_id
        self.synced: int | None = None
        self.problem = ""
        self.retry_at = 0.0
        self.missed = 0
        self._pause = _FIRST_RETRY_SECONDS
        self._primary = primary
        self._outbox: Outbox = primary.outbox
        self._firsts: dict[int, int] = {}  # the first record of each entry that is not committed
        self._last = 0

    @property
    def key(self) -> bytes:
        """The session's id, 16 bytes."""
        return bytes.fromhex(self.session.session_id)

    # --- RecordWriter ------------------------------------------------------------------------------------

    @property
    def written_bytes(self) -> int:
        """The bytes of the records of all sessions so far."""
        return self._outbox.written_bytes

    @property
    def position(self) -> LogPosition:
        """The place behind the last record."""
        return LogPosition(self._primary.epoch, self._outbox.position)

    @property
    def durable_position(self) -> LogPosition:
        """The place behind the last record of this session that the standby has, and the session with it."""
        with self._outbox.changed:
            return LogPosition(self._primary.epoch, self._outbox.position if self._is_durable(self._last) else 0)

    def check(self) -> None:
        """Refuse what could not be acknowledged.

        Raises:
            FencedError: NOT_PRIMARY, a standby was promoted.
            UnavailableError: NO_STANDBY, no standby has the session just now.
        """
        with self._outbox.changed:
            self._primary.check()
            if not self._primary.alone and self.synced is None:
                raise no_standby(self.problem or "the standby is still being brought up to date")

    def append(self, record: Record, *, durable: bool = False, awaited: bool = False) -> int:
        """Send a record; see `RecordWriter`.

        Raises:
            FencedError, UnavailableError: as `check`, for a chunk alone: a commit has changed the state.
        """
        kind = RecordKind(record.kind)
        if kind is RecordKind.CHUNK:
            self._primary.check()
            self._outbox.wait_for_room(as_array(record.payload).nbytes, lambda: self._primary.is_sending)
            self._primary.check()
        with self._outbox.changed:
            if kind is RecordKind.CHUNK:
                self._firsts.setdefault(record.entry, self._outbox.position + 1)
            elif self._firsts.pop(record.entry, self._outbox.position + 1) <= self._outbox.joined:
                self.missed += 1
                self.synced = None  # the standby came while the entry's chunks arrived, and lacks some of them
                self._last = self._primary.send(Subject(RecordKind.LOOK))
                self._primary.wake()
                return self._last
            number = self._primary.send(
                Subject(kind, record.session, record.entry), record.meta, as_array(record.payload)
            )
            if record.kind is not Kind.CHUNK:
                self._last = number
            return number

    def wait(self, number: int) -> None:
        """Wait until the standby has a record, and the session with it.

        Raises:
            FencedError: NOT_PRIMARY.
            UnavailableError: NO_STANDBY, the standby was lost meanwhile; the record may reach it yet.
        """
        with self._outbox.changed:
            while not self._is_durable(number):
                self._primary.check()
                if self.problem:
                    raise no_standby(self.problem)
                self._outbox.changed.wait()
            self._primary.check_deposed()

    def keeps(self, number: int) -> bool:
        """Tell whether a record that was waited for survives a loss of the server: a standby has it."""
        with self._outbox.changed:
            return not self._primary.alone and self._is_durable(number)

    def drop(self, session: bytes, entry: int) -> None:
        """Have the standby forget the chunks of an entry that belong to no commit."""
        with self._outbox.changed:
            if self._firsts.pop(entry, None) is not None and not self._primary.deposed:
                self._primary.send(Subject(RecordKind.DROP, session, entry))

    # --- the standby's state of the session --------------------------------------------------------------

    def sent(self, number: int) -> None:
        """Note that the standby has the session whole once it has a record."""
        with self._outbox.changed:
            self.synced, self.problem, self._pause = number, "", _FIRST_RETRY_SECONDS
            self._last = max(self._last, number)
            self._outbox.changed.notify_all()

    def failed(self, problem: str, now: float) -> None:
        """Note that the standby could not follow the session."""
        with self._outbox.changed:
            self.synced, self.problem, self.retry_at = None, problem, now + self._pause
            self._pause = min(2 * self._pause, _MOST_RETRY_SECONDS)
            self._outbox.changed.notify_all()

    def _is_durable(self, number: int) -> bool:
        if self._primary.alone:
            return True
        has_session = self.synced is not None and self.synced <= self._outbox.acknowledged
        return has_session and number <= self._outbox.acknowledged and self._primary.is_member
