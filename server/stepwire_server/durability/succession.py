"""The begin of an owner of an object store: its epoch, and the question of whose sessions count.

The data directory that wrote the store's last index has the newest state of all sessions: the store is a copy of it.
Any other data directory is behind. What it has is set aside, and the sessions of the store come in its place.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import secrets
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import structlog

from stepwire.errors import DataLossError, InvalidRequestError, Reason, StepwireError
from stepwire_server.durability.archive import Archive, ArchivedSession, decode_archived
from stepwire_server.durability.checkpoint import BODY, MANIFEST
from stepwire_server.durability.checkpoints import AUTOMATIC_PREFIX, CheckpointStore
from stepwire_server.durability.disk import Disk, write_new
from stepwire_server.durability.epochs import Epochs
from stepwire_server.durability.moved import MovedSession, read_moved
from stepwire_server.durability.object_store import ObjectStore
from stepwire_server.durability.store_epochs import StoreEpochs
from stepwire_server.durability.store_index import StoredCheckpoint, StoreIndex, newest_index, session_folder

__all__ = ["SESSION", "Succession"]

SESSION: Final = "session.json"
"""The name of the object that describes a session."""

_STORE: Final = "store.json"
_MARK: Final = "store.json"
_ASIDE: Final = "superseded"
_MOST_BYTES: Final = 256 << 20

_log = structlog.get_logger()


class _Bond(msgspec.Struct, frozen=True, kw_only=True):
    """The bond of a data directory with a store: the random ids of both."""

    store: str
    directory: str


class Succession:
    """One data directory on its way to the ownership of a store.

    Attributes:
        objects: the store.
        epochs: its epochs.
        index: its last index; None for a store that is new.
        directory: the id of the data directory.
        lost: the reason for each session of the store that could not be brought here, by its id.
    """

    def __init__(self, disk: Disk, folder: pathlib.Path, objects: ObjectStore) -> None:
        """Look at both, and change nothing that an owner has.

        Raises:
            InvalidRequestError: the directory has sessions, and the store has those of another one.
            DataLossError: the index is damaged.
            OSError: the disk or the store failed.
        """
        self._disk, self._folder, self.objects = disk, folder, objects
        self.epochs = StoreEpochs(objects)
        self._store_id = _store_id(objects)
        bond = self._bond()
        self._known = bond is not None and bond.store == self._store_id
        self.directory = bond.directory if bond is not None and self._known else secrets.token_hex(16)
        self.lost: dict[str, StepwireError] = {}
        self.index: StoreIndex | None = None
        self._look()

    def acquire(self, epochs: Epochs, folders: Sequence[str]) -> int:
        """Create an epoch in the store and in the directory, and set aside what is behind the store.

        Args:
            epochs: the epochs of the directory.
            folders: the names of the folders in the directory that a newer state replaces.

        Returns:
            The epoch, of one number in both.

        Raises:
            StepwireError, OSError: as the constructor.
        """
        epoch = epochs.newest()
        while True:
            instance = secrets.token_hex(8)
            made = self.epochs.acquire(epoch, instance)
            epoch = epochs.acquire(instance, made)
            if epoch == made:
                break
        self._look()
        if self._is_behind and self._known and any(self._disk.names(self._folder / name) for name in folders):
            self._set_aside(epoch, folders)
        if not self._known:
            if self._disk.exists(self._folder / _MARK):  # of another store
                self._disk.remove(self._folder / _MARK)
            bond = _Bond(store=self._store_id, directory=self.directory)
            write_new(self._disk, self._folder / _MARK, [msgspec.json.encode(bond)])
            self._disk.sync_folder(self._folder)
        return epoch

    def adopt(self, archive: Archive, closed: set[str]) -> None:
        """Bring the sessions here that the store has and the directory has not; what cannot be brought is in `lost`.

        Args:
            archive: the sessions of the directory.
            closed: the ids of those that were closed here.

        Raises:
            OSError: the disk or the store failed.
        """
        for session_id, stored in ({} if self.index is None else self.index.sessions).items():
            if archive.has(session_id) or session_id in closed:
                continue
            try:
                self._adopt(archive, session_id, stored)
            except StepwireError as error:
                _log.error("session not brought from the store", session_id=session_id, problem=str(error))
                self.lost[session_id] = error

    def _adopt(self, archive: Archive, session_id: str, stored: dict[str, StoredCheckpoint]) -> None:
        objects = self.objects
        try:
            text = objects.read(f"{session_folder(session_id)}{SESSION}", _MOST_BYTES)
        except FileNotFoundError as error:
            raise _missing(session_id, str(error)) from None
        session: ArchivedSession = decode_archived(text, f"{objects.url}: {session_id}")

        archive.add(session, functools.partial(self._bring, session_id, stored))

    def _bring(self, session_id: str, stored: dict[str, StoredCheckpoint], store: CheckpointStore) -> None:
        """Bring the checkpoints of a session, the newest first: of the automatic ones the newest alone.

        Raises:
            DataLossError: the newest is damaged, or none is there.
        """
        brought = list[str]()
        for name in sorted(stored, key=lambda each: stored[each].age, reverse=True):
            if name.startswith(AUTOMATIC_PREFIX) and any(each.startswith(AUTOMATIC_PREFIX) for each in brought):
                continue
            try:
                text = self.objects.read(f"{stored[name].folder}{MANIFEST}", _MOST_BYTES)
                parts = self.objects.parts(f"{stored[name].folder}{BODY}")
                store.receive(name, text, _bounded(parts, stored[name].body_bytes))
            except (FileNotFoundError, DataLossError) as error:  # somebody has deleted one that is missing
                _log.warning("checkpoint not brought", session_id=session_id, checkpoint=name, problem=str(error))
                if isinstance(error, DataLossError) and not brought:
                    raise
                continue
            brought.append(name)
            _log.info("checkpoint brought", session_id=session_id, checkpoint=name, step=stored[name].step)
        if not brought:
            raise _missing(session_id, "none of its checkpoints is there")

    @property
    def moved(self) -> tuple[MovedSession, ...]:
        """The records of sessions that live on elsewhere, if the store knows more of them than the directory.

        Raises:
            DataLossError: one is damaged.
        """
        texts = self.index.moved.values() if self.index is not None and self._is_behind else ()
        return tuple(read_moved(text, f"the index of {self.objects.url}") for text in texts)

    @property
    def _is_behind(self) -> bool:
        return self.index is not None and self.index.directory != self.directory

    def _look(self) -> None:
        """Read the index, and refuse a directory that has nothing to do with it.

        Raises:
            InvalidRequestError: it has sessions.
        """
        self.index = newest_index(self.objects)
        if self._is_behind and not self._known and self._has_sessions():
            raise InvalidRequestError.of(
                "checkpoint_store",
                f"{self.objects.url} has the sessions of another data directory, and {self._folder} has its own; start "
                "with an empty data directory, or with another prefix of the store",
            )

    def _has_sessions(self) -> bool:
        folder = self._folder / "sessions"
        return self._disk.exists(folder) and bool(self._disk.names(folder))

    def _set_aside(self, epoch: int, folders: Sequence[str]) -> None:
        aside = self._folder / _ASIDE / f"{epoch:016x}"
        os.makedirs(aside, mode=0o700, exist_ok=True)
        for name in folders:
            self._disk.rename(self._folder / name, aside / name)
            self._disk.make_folder(self._folder / name)
        self._disk.sync_folder(aside)
        self._disk.sync_folder(self._folder)
        _log.warning("another server has gone on with the sessions of this directory since", set_aside=str(aside))

    def _bond(self) -> _Bond | None:
        try:
            return msgspec.json.decode((self._folder / _MARK).read_bytes(), type=_Bond)
        except (FileNotFoundError, msgspec.DecodeError):
            return None


def _store_id(objects: ObjectStore) -> str:
    """Return the random id of a store, made with its first use."""
    mine = secrets.token_hex(16)
    if objects.create(_STORE, json.dumps({"format": 1, "store": mine}).encode()):
        return mine
    try:
        return str(json.loads(objects.read(_STORE, _MOST_BYTES))["store"])
    except (ValueError, KeyError, TypeError):
        raise DataLossError(
            f"{objects.url}: {_STORE} is none of stepwire's; use another prefix of the store",
            reason=Reason.CHECKPOINT_DAMAGED,
        ) from None


def _bounded(parts: Iterator[bytes], nbytes: int) -> Iterator[bytes]:
    """Yield parts, and refuse more bytes than there should be."""
    for part in parts:
        nbytes -= len(part)
        if nbytes < 0:
            raise DataLossError("the arrays are longer than the index says", reason=Reason.CHECKPOINT_DAMAGED)
        yield part


def _missing(session_id: str, problem: str) -> DataLossError:
    return DataLossError(
        f"session {session_id} could not be brought from the object store: {problem}; restore its objects and start "
        "the server again, or close the session",
        reason=Reason.CHECKPOINT_DAMAGED,
        metadata={"session_id": session_id},
    )
