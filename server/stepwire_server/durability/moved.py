"""The records of sessions that live on elsewhere: what is left of each, and tells its clients where.

    DIR/moved/6a0c…            one file a session

A record is written in the folder of its owner's epoch, and linked to its own name. So it is there whole or not at all,
nothing is overwritten, and an owner that was overtaken can make none: it has no such folder any more, and the newer
owner reads the records behind that. The session's own folder is removed after the record is there. Where both are
there, the record counts. The newest records of each tenant are kept, so that moves without end fill nothing.
"""

from __future__ import annotations

import os
import pathlib
import secrets
from collections.abc import Callable, Iterable
from typing import Final

import google_crc32c
import msgspec
import structlog

from stepwire.errors import DataLossError, FencedError, Reason, SessionMovedError
from stepwire_server.durability.disk import Disk, read_all, write_new

__all__ = ["LONGEST_TARGET", "MOST_SHARDS", "MovedHold", "MovedSession", "MovedSessions", "MovedShard", "read_moved"]

_MOST_BYTES: Final = 16 << 20
_MOST_RECORDS: Final = 256
"""The records of one tenant that are kept. A record has a line for each shard, and a hold for each worker."""
MOST_SHARDS: Final = 256
"""The shards of a successor."""
LONGEST_TARGET: Final = 256
"""The characters of a shard's target."""
_log = structlog.get_logger()


class MovedShard(msgspec.Struct, frozen=True):
    """One shard of a successor.

    Attributes:
        session_id: the id of its session.
        target: the target of its server.
        attach_key: the key of its attach tokens; empty if it is not known.
    """

    session_id: str
    target: str
    attach_key: bytes = b""


class MovedHold(msgspec.Struct, frozen=True):
    """The last hold of a worker.

    Attributes:
        generation: the number of the hold.
        acquired: the generation in which the client of that hold took the worker from another one.
    """

    generation: int
    acquired: int


class MovedSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session that lives on elsewhere.

    Attributes:
        session_id: its id.
        request_id: the request that created it, with its tenant.
        tenant: its tenant.
        move_id: the name of the move.
        attach_key: the key of its attach tokens.
        holds: the last holds of the workers that had joined, by index.
        shards: the successor.
        number: of the record: later ones have larger numbers.
        crc32c: the CRC32C of the fields before.
        format: the version of the format.
    """

    session_id: str
    request_id: str
    tenant: str
    move_id: str
    attach_key: bytes
    holds: dict[int, MovedHold]
    shards: tuple[MovedShard, ...]
    number: int = 0
    crc32c: int = 0
    format: int = 1

    def checked(self) -> MovedSession:
        """Return the record with the CRC32C of its fields."""
        text = msgspec.json.encode(msgspec.structs.replace(self, crc32c=0))
        return msgspec.structs.replace(self, crc32c=int(google_crc32c.value(text)))

    def text(self) -> str:
        """Return the record as it is kept, in JSON."""
        return msgspec.json.encode(self).decode()

    def numbered(self, number: int) -> MovedSession:
        """Return the record with another number."""
        return msgspec.structs.replace(self, number=number).checked()


class MovedSessions:
    """The records of one server: in memory, and those of durable sessions in a folder too."""

    def __init__(self, found: Iterable[MovedSession] = ()) -> None:
        """Have some records, in memory alone."""
        self._found = {each.session_id: each for each in sorted(found, key=lambda each: each.number)}
        self._requests = {each.request_id: each.session_id for each in self._found.values()}
        self._number = max((each.number for each in self._found.values()), default=0)
        self._disk: Disk | None = None
        self._durable = set[str]()
        self._publish: Callable[[Iterable[MovedSession]], object] = lambda records: None
        self._folder = self._work = pathlib.Path()

    @classmethod
    def read(cls, disk: Disk, folder: pathlib.Path, work: pathlib.Path) -> MovedSessions:
        """Read the records of a data directory, and keep further ones there.

        Args:
            disk: the file system.
            folder: the folder of the records, which exists.
            work: the folder for what the owner of the epoch has not completed.

        Raises:
            DataLossError: a record is damaged: nobody can tell where its session is.
            OSError: the disk failed.
        """
        moved = cls(_read(disk, folder / name) for name in disk.names(folder))
        moved._disk, moved._folder, moved._work = disk, folder, work
        moved._durable.update(moved._found)
        return moved

    def bring(self, records: Iterable[MovedSession]) -> None:
        """Keep the records that an object store has, and the folder has not.

        Raises:
            FencedError, DataLossError: as `add`.
        """
        for record in sorted(records, key=lambda each: each.number):
            if record.session_id not in self._found:
                self.add(record, durable=True)

    def publish(self, publish: Callable[[Iterable[MovedSession]], object]) -> None:
        """Have a function keep the records of durable sessions in an object store, too, whenever there is one more."""
        self._publish = publish

    def durable(self) -> tuple[MovedSession, ...]:
        """Return the records that are on the disk."""
        return tuple(each for each in self._found.values() if each.session_id in self._durable)

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all sessions that have moved."""
        return tuple(self._found)

    def get(self, session_id: str) -> MovedSession | None:
        """Return a record; None for a session that has not moved."""
        return self._found.get(session_id)

    def add(self, record: MovedSession, *, durable: bool) -> None:
        """Keep a record, and the newest of its tenant.

        One that is to be durable is on the disk when this returns, and in the object store if there is one.

        Raises:
            FencedError: NOT_PRIMARY, another server owns the directory, or the store. There is no record.
            DataLossError: DURABILITY_FAILED, the disk or the store failed. The record may be there.
        """
        self._number += 1
        numbered = record.numbered(self._number)
        if durable and self._disk is not None:
            self._write(self._disk, numbered)
            self._publish([*self.durable(), numbered])
            self._durable.add(record.session_id)
        self._found.pop(record.session_id, None)  # so that the order is that of the numbers
        self._found[record.session_id] = numbered
        self._requests[record.request_id] = record.session_id
        of_tenant = [each for each in self._found.values() if each.tenant == record.tenant]
        for former in of_tenant[:-_MOST_RECORDS]:
            self._forget(former)

    def check(self, session_id: str) -> None:
        """Refuse the calls of a session that has moved.

        Raises:
            SessionMovedError: it has.
        """
        if session_id in self._found:
            raise _moved(f"session {session_id}", session_id)

    def check_request(self, request_id: str) -> None:
        """Refuse the request that created a session which has moved: another one must not begin in its place.

        Raises:
            SessionMovedError: it has.
        """
        if request_id in self._requests:
            raise _moved("the session of this request_id", self._requests[request_id])

    def _forget(self, record: MovedSession) -> None:
        """Let a record go, from the disk too; one that stays there is read once more by the next owner."""
        del self._found[record.session_id]
        self._durable.discard(record.session_id)
        if self._requests.get(record.request_id) == record.session_id:  # else a later record has the request
            del self._requests[record.request_id]
        if self._disk is not None and self._disk.exists(path := self._folder / record.session_id):
            try:
                self._disk.remove(path)
            except OSError as error:
                _log.warning("record of a moved session not removed", path=str(path), problem=str(error))

    def _write(self, disk: Disk, record: MovedSession) -> None:
        whole = self._work / f".new-{secrets.token_hex(8)}"
        try:
            write_new(disk, whole, [record.text().encode()])
            try:
                disk.link(whole, self._folder / record.session_id)
            except FileExistsError:  # by an attempt that failed behind it, since nobody else writes there
                if _read(disk, self._folder / record.session_id).numbered(record.number) != record:
                    raise
            disk.sync_folder(self._folder)
            disk.remove(whole)
        except OSError as error:
            if not disk.exists(self._work):
                raise FencedError(
                    "another server owns the data directory now; connect to that one", reason=Reason.NOT_PRIMARY
                ) from None
            raise DataLossError(
                f"the record of the move cannot be kept in the data directory: {error}; ask for it again",
                reason=Reason.DURABILITY_FAILED,
            ) from error


def _read(disk: Disk, path: pathlib.Path) -> MovedSession:
    descriptor = disk.open(path, os.O_RDONLY)
    try:
        data = bytearray(min(disk.size(descriptor), _MOST_BYTES))
        text = bytes(data[: read_all(disk, descriptor, memoryview(data), 0)])
    finally:
        disk.close(descriptor)
    return read_moved(text, str(path))


def read_moved(text: str | bytes, place: str) -> MovedSession:
    """Read a record that is kept somewhere.

    Raises:
        DataLossError: it is damaged: nobody can tell where its session is.
    """
    try:
        record = msgspec.json.decode(text, type=MovedSession)
        problem = "" if record == record.checked() else "its checksum is another one"
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problem = str(error)
    if problem:
        raise DataLossError(
            f"{place} describes no session that has moved: {problem}; restore it from a copy",
            reason=Reason.CHECKPOINT_DAMAGED,
            metadata={"path": place},
        )
    return record


def _moved(what: str, session_id: str) -> SessionMovedError:
    return SessionMovedError(
        f"{what} lives on in sessions of other servers; a client follows by itself, so find it with "
        "`Client.session(session_id)`, of a client of this server",
        metadata={"session_id": session_id},
    )
