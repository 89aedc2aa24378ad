"""One session on a standby: made, brought whole, and followed record by record."""

from __future__ import annotations

import msgspec
import numpy as np

from stepwire.errors import DataLossError, Reason
from stepwire_server.durability.records import Header, Kind
from stepwire_server.replication.digests import digest_of
from stepwire_server.replication.records import (
    BlockPlace,
    ReceivedRecord,
    RecordKind,
    ReplicationRecord,
    SessionOpening,
    StateNumbers,
    captured_of,
)
from stepwire_server.sessions.incoming_state import IncomingState
from stepwire_server.sessions.redo import ChunkRecords, Codec, Redo
from stepwire_server.sessions.session import Session

__all__ = ["ReplicatedSession"]


class ReplicatedSession:
    """A session that follows another one. One thread uses it.

    Attributes:
        session: the session.
        request_id: the request that created it, with its tenant.
        whole: it has all that the records so far tell of.
    """

    def __init__(self, session: Session, opening: SessionOpening, codec: Codec, chunks: ChunkRecords) -> None:
        """Follow from the opening of a session on.

        Args:
            session: the session, at step 0.
            opening: its description.
            codec: decodes steps.
            chunks: those that came before, of commits to come.
        """
        self.session, self.request_id, self.whole = session, opening.request_id, opening.fresh
        self.chunks = chunks
        self._redo = Redo(session, codec, chunks)
        self._incoming: IncomingState | None = None
        self._backlog: list[ReplicationRecord] = []
        session.ledger.members.tokens.adopt(opening.attach_key)
        session.ledger.worker.restore(1, session.ledger.epoch)

    def add(self, record: ReplicationRecord) -> None:
        """Follow one record.

        Raises:
            DataLossError: a record before this one is missing.
            StepwireError: the step or load cannot be made again.
        """
        if record.kind is RecordKind.STATE:
            self._incoming = self.session.exchange.incoming()
        elif record.kind is RecordKind.BLOCK and self._incoming is not None:
            place = msgspec.msgpack.decode(record.meta, type=BlockPlace)
            self._incoming.write(place.slot, place.start, record.payload.view(np.float32))
        elif record.kind is RecordKind.STATE_END:
            self._complete(msgspec.msgpack.decode(record.meta, type=StateNumbers))
        elif record.kind is RecordKind.DROP:
            self.chunks.pop((0, record.entry), None)
        elif self.whole:
            self._redo.add(received(record))
        else:
            self._backlog.append(record)

    def digest(self) -> bytes:
        """Return the digest of the present moment; empty for a session that is not whole.

        Raises:
            StepwireError: as `StateExchange.captured`.
        """
        if not self.whole:
            return b""
        with self.session.exchange.captured() as captured:
            return digest_of(captured)

    def close(self) -> None:
        """Free the memory. Closing twice is harmless."""
        if self._incoming is not None:
            self._incoming.close()
        self.session.close()

    def _complete(self, numbers: StateNumbers) -> None:
        if self._incoming is None:
            raise DataLossError("a state ends that did not begin", reason=Reason.SESSION_DAMAGED)
        with self._incoming as incoming:
            self.session.exchange.restored(incoming, captured_of(numbers))
        self._incoming, self.whole = None, True
        backlog, self._backlog = self._backlog, []
        for record in backlog:
            self._redo.add(received(record))


def received(record: ReplicationRecord) -> ReceivedRecord:
    """Return a record of a journal as `Redo` reads it; entries are unique for a primary, so its epoch is left out."""
    sizes = (len(record.meta), record.payload.nbytes)
    header = Header(Kind(record.kind), record.session, record.entry, *sizes, record.number, 0, False, 0, 0)
    return ReceivedRecord(header, record.meta, record.payload)
