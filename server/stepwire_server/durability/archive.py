"""The sessions of a data directory: a folder each, with the config, the creating request, and checkpoints."""

from __future__ import annotations

import os
import pathlib
import re
import secrets
from collections.abc import Callable
from typing import Final

import google_crc32c
import msgspec
import structlog

from stepwire.errors import DataLossError, Reason, SessionNotFoundError
from stepwire_server.durability.checkpoint import MANIFEST
from stepwire_server.durability.checkpoints import CheckpointStore
from stepwire_server.durability.disk import Disk, read_all, write_new
from stepwire_server.durability.folders import NEW_PREFIX, NewFolder, is_folder, remove_files

__all__ = ["Archive", "ArchivedSession", "checkpoints_of", "decode_archived"]

_FILE: Final = "session.json"
_CHECKPOINTS: Final = "checkpoints"
_ID: Final = re.compile(r"[0-9a-f]{32}")
_MOST_BYTES: Final = 256 << 20

_log = structlog.get_logger()


class ArchivedSession(msgspec.Struct, frozen=True, kw_only=True):
    """A session as its folder describes it.

    Attributes:
        session_id: its id.
        request_id: the request that created it.
        config: the config of its creation, as a message of the contract.
        create_time: the time of its creation, in seconds since 1970.
        attach_key: the key of the attach tokens; empty in a folder of an earlier release.
        crc32c: the CRC32C of the fields before.
        format: the version of the format.
    """

    session_id: str
    request_id: str
    config: bytes
    create_time: float
    attach_key: bytes = b""
    crc32c: int = 0
    format: int = 1

    def checksum(self) -> int:
        """Return the CRC32C of the fields."""
        text = f"{self.session_id} {self.request_id} {self.create_time!r} ".encode()
        return int(google_crc32c.value(text + self.config + self.attach_key))


class Archive:
    """The folder of all sessions. Thread-safe, as far as each session has one user at a time."""

    def __init__(self, disk: Disk, folder: pathlib.Path, work: pathlib.Path) -> None:
        """Serve a folder that exists; sessions and checkpoints that are not complete lie in `work`."""
        self._disk = disk
        self._work = work
        self._folder = folder
        self._stores: dict[str, CheckpointStore] = {}
        self._adding: set[str] = set()

    def add(self, session: ArchivedSession, begin: Callable[[CheckpointStore], object] | None = None) -> None:
        """Keep a new session; it is there for good when this returns.

        Args:
            session: the session.
            begin: saves its first checkpoint, before the session is there; None for none.

        Raises:
            OSError: the disk failed; nothing stays.
            StepwireError: as `begin`; nothing stays.
        """
        folder = NewFolder(self._disk, self._folder / session.session_id, _FILE, self._adding, self._work)
        folder.make()
        try:
            checked = msgspec.structs.replace(session, crc32c=session.checksum())
            write_new(self._disk, folder.path / _FILE, [msgspec.json.encode(checked)])
            self._disk.make_folder(folder.path / _CHECKPOINTS)
            if begin is not None:
                begin(CheckpointStore(self._disk, folder.path / _CHECKPOINTS))
            folder.publish()
        except BaseException:
            self._discard(folder)
            raise

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all sessions, sorted.

        Raises:
            OSError: the disk failed.
        """
        return tuple(name for name in self._disk.names(self._folder) if _ID.fullmatch(name))

    def has(self, session_id: str) -> bool:
        """Tell whether there is a session of this id."""
        return bool(_ID.fullmatch(session_id)) and self._disk.exists(self._folder / session_id / _FILE)

    def get(self, session_id: str) -> ArchivedSession:
        """Return a session.

        Raises:
            SessionNotFoundError: there is none of this id.
            DataLossError: its folder is damaged.
            OSError: the disk failed.
        """
        return decode_archived(self.text(session_id), str(self._folder / session_id / _FILE))

    def text(self, session_id: str) -> bytes:
        """Return the file that describes a session.

        Raises:
            SessionNotFoundError: there is none of this id.
            OSError: the disk failed.
        """
        path = self._folder / session_id / _FILE
        if not self.has(session_id):
            raise SessionNotFoundError(f"session {session_id[:64]!r} is not in {self._folder}")
        descriptor = self._disk.open(path, os.O_RDONLY)
        try:
            data = bytearray(min(self._disk.size(descriptor), _MOST_BYTES))
            return bytes(data[: read_all(self._disk, descriptor, memoryview(data), 0)])
        finally:
            self._disk.close(descriptor)

    def checkpoints(self, session_id: str) -> CheckpointStore:
        """Return the checkpoints of a session."""
        if (store := self._stores.get(session_id)) is None:
            store = CheckpointStore(self._disk, self._folder / session_id / _CHECKPOINTS, self._work)
            self._stores[session_id] = store
        return store

    def remove(self, session_id: str) -> None:
        """Forget a session; it is gone for good when this returns, whatever of it is still being removed.

        Raises:
            OSError: the disk failed, and the session is still there.
        """
        folder = self._folder / session_id
        gone = self._folder / f"{NEW_PREFIX}{session_id}-{secrets.token_hex(4)}"
        self._disk.rename(folder, gone)
        self._stores.pop(session_id, None)
        try:
            self._disk.sync_folder(self._folder)
        except OSError:
            self._disk.rename(gone, folder)
            raise
        self._clear(gone)

    def tidy(self) -> None:
        """Remove the remains of sessions that were being removed when a server ended.

        Raises:
            OSError: the disk failed.
        """
        for name in self._disk.names(self._folder):
            if name.startswith(NEW_PREFIX):
                self._clear(self._folder / name)

    def _clear(self, folder: pathlib.Path) -> None:
        """Remove what no name leads to any more; the next start tries again what cannot be removed now."""
        try:
            self._clear_checkpoints(folder)
            remove_files(self._disk, folder, _FILE)
        except OSError as error:
            _log.warning("session's files not removed", folder=str(folder), problem=str(error))

    def _clear_checkpoints(self, folder: pathlib.Path) -> None:
        checkpoints = folder / _CHECKPOINTS
        if self._disk.exists(checkpoints) and is_folder(self._disk, checkpoints):
            for name in self._disk.names(checkpoints):
                remove_files(self._disk, checkpoints / name, MANIFEST)
            self._disk.remove_folder(checkpoints)

    def _discard(self, folder: NewFolder) -> None:
        self._clear_checkpoints(folder.path)
        folder.discard()


def decode_archived(text: bytes, place: str) -> ArchivedSession:
    """Read the description of a session; `place` names it in errors.

    Raises:
        DataLossError: it is damaged.
    """
    try:
        session = msgspec.json.decode(text, type=ArchivedSession)
        problem = "" if session.checksum() == session.crc32c else "its checksum is another one"
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problem = str(error)
    if problem:
        raise DataLossError(
            f"{place} describes no session: {problem}; restore the file, or move the folder away",
            reason=Reason.CHECKPOINT_DAMAGED,
            metadata={"path": place},
        )
    return session


def checkpoints_of(disk: Disk, folder: pathlib.Path, session_id: str) -> CheckpointStore:
    """Return the checkpoints of a session in the folder of all sessions, for reading without a server.

    Raises:
        SessionNotFoundError: there is none of this id.
        OSError: the disk failed.
    """
    if not _ID.fullmatch(session_id) or not disk.exists(folder / session_id / _FILE):
        raise SessionNotFoundError(f"session {session_id[:64]!r} is not in {folder}")
    return CheckpointStore(disk, folder / session_id / _CHECKPOINTS)
