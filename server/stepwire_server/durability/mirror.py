"""The checkpoints of a data directory in an object store: uploaded, deleted, and told of, by a thread of their own.

The order is the fence. An owner uploads objects, writes an index that names them, looks for a newer epoch, and only
then says that they are there, or deletes what the index no longer names. A newer owner creates its epoch before it
reads the index. So nothing that its index names is ever deleted by an older owner, however long that one was paused.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import threading
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import google_crc32c
import msgspec
import structlog

from stepwire.errors import DataLossError, FencedError, Reason
from stepwire_server.durability.archive import Archive
from stepwire_server.durability.checkpoint import BODY, MANIFEST, CheckpointInfo
from stepwire_server.durability.disk import Disk, write_new
from stepwire_server.durability.moved import MovedSession
from stepwire_server.durability.store_index import (
    INDEX,
    SESSIONS,
    StoredCheckpoint,
    StoreIndex,
    epoch_of,
    index_key,
    session_folder,
    write_index,
)
from stepwire_server.durability.succession import SESSION, Succession

__all__ = ["CLOSED", "Mirror", "StoredState"]

CLOSED: Final = "closed"
"""The folder with a file for each session that was closed here, and is in the store still."""

LOOK_SECONDS: Final = 10.0
"""The longest time between two looks for a newer owner."""

_LONGEST_DELAY_SECONDS: Final = 60.0
_INDEXES_KEPT: Final = 2

_log = structlog.get_logger()


class StoredState(NamedTuple):
    """The way of a checkpoint into the store.

    Attributes:
        stored: it is there.
        problem: the reason why the last upload failed; empty without one.
    """

    stored: bool
    problem: str


class _Local(NamedTuple):
    """A good checkpoint on the disk: its line in a list, its folder, and the content of its manifest."""

    info: CheckpointInfo
    folder: pathlib.Path
    manifest: bytes

    @property
    def crc32c(self) -> int:
        return int(google_crc32c.value(self.manifest))


class _Waste:
    """Objects that count no more: those of checkpoints, by the beginning of their keys, and indexes, the last one too.

    Attributes:
        folders: of checkpoints.
        indexes: written by this owner.
        older: some may be left of older owners.
    """

    def __init__(self) -> None:
        self.folders: set[str] = set()
        self.indexes: list[str] = []
        self.older = True


class Mirror:
    """The copy of a data directory's checkpoints. Thread-safe.

    Attributes:
        owns: no newer owner of the store has been seen.
        lost: the reason for each session of the store that could not be brought here, by its id.
    """

    def __init__(
        self,
        disk: Disk,
        folder: pathlib.Path,
        archive: Archive,
        succession: Succession,
        epoch: int,
        moved: Iterable[MovedSession] = (),
    ) -> None:
        """Bring the sessions here that the store alone has, and go on from its index as the owner of an epoch.

        Args:
            disk: the file system.
            folder: the data directory.
            archive: its sessions.
            succession: the begin of this owner.
            epoch: the epoch.
            moved: the records of the sessions that live on elsewhere.

        Raises:
            FencedError: the store has a newer owner already.
            OSError: the disk or the store failed.
        """
        self._disk, self._archive, self._epoch = disk, archive, epoch
        self._objects, self._epochs = succession.objects, succession.epochs
        self._closed = folder / CLOSED
        moved = tuple(moved)
        succession.adopt(archive, {*self.closed(), *(each.session_id for each in moved)})
        self.lost = succession.lost
        index = succession.index or StoreIndex(directory="")
        self._index = msgspec.structs.replace(index, directory=succession.directory, crc32c=0)
        self._publishing = threading.Lock()  # of the index, and of what it makes superfluous
        self.owns = True
        self._written = self._failures = 0
        self._problem = ""
        self._waste = _Waste()
        self._tell: Callable[[str, int], object] = lambda session_id, step: None
        self._turn, self._lock = threading.Lock(), threading.Lock()  # of one pass at a time; of the set
        self._touched = {*archive.ids(), *self.closed()}
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="object store", daemon=True)
        # Before anything is served: the next owner goes on from here.
        self._publish(lambda index: index.with_moved(moved))

    def on_stored(self, tell: Callable[[str, int], object]) -> None:
        """Have a function told the session and the step of each checkpoint that has reached the store."""
        self._tell = tell

    def start(self) -> None:
        """Upload from now on."""
        self._wake.set()
        self._thread.start()

    def closed(self) -> set[str]:
        """Return the ids of the sessions that were closed here and are in the store still."""
        return set(self._disk.names(self._closed))

    def close_session(self, session_id: str) -> None:
        """Note that a session is about to be removed from the disk: its objects go too.

        Raises:
            OSError: the disk failed.
        """
        with contextlib.suppress(FileExistsError):
            write_new(self._disk, self._closed / session_id, ())
        self._disk.sync_folder(self._closed)

    def keep_moved(self, records: Iterable[MovedSession]) -> None:
        """Have the store tell of the sessions that live on elsewhere; it does when this returns.

        Raises:
            FencedError: NOT_PRIMARY, another server owns the store.
            DataLossError: DURABILITY_FAILED, the store failed; it may tell of them.
        """
        kept = tuple(records)
        try:
            self._publish(lambda index: index.with_moved(kept))
        except OSError as error:
            raise DataLossError(
                f"the record of the move cannot be kept in the object store: {error}; ask for it again",
                reason=Reason.DURABILITY_FAILED,
            ) from error

    def check_stored(self, session_id: str, seconds: float) -> None:
        """Bring a session to the store now, whatever is left to do of others.

        Raises:
            FencedError: NOT_PRIMARY, another server owns the store.
            DataLossError: DURABILITY_FAILED, it is not there, or an upload of others takes longer than some seconds.
        """
        problem = "an upload of other sessions takes longer"
        if self._turn.acquire(timeout=seconds):
            try:
                self._check_owner()
                self._bring(session_id)
                problem = "" if session_id in self._index.sessions else "its checkpoint is damaged"
            except OSError as error:
                problem = str(error)
            finally:
                self._turn.release()
        if problem:
            raise DataLossError(
                f"the session is not in the object store: {problem}; mend the disk or the store, and call again",
                reason=Reason.DURABILITY_FAILED,
            )

    def touch(self, session_id: str) -> None:
        """Have the checkpoints of a session compared with those in the store."""
        with self._lock:
            self._touched.add(session_id)
        if not self._failures:  # a store that fails is left alone for a while
            self._wake.set()

    def stored_step(self, session_id: str) -> int:
        """Return the last step of a session that the store has; 0 for none."""
        return max((each.step for each in self._index.sessions.get(session_id, {}).values()), default=0)

    def state(self, session_id: str, info: CheckpointInfo) -> StoredState:
        """Tell how far a checkpoint has come."""
        stored = self._index.sessions.get(session_id, {}).get(info.name)
        there = stored is not None and (stored.step, stored.load, stored.created) == (
            info.step,
            info.load,
            info.created,
        )
        return StoredState(there, "" if there else self._problem)

    def look(self) -> bool:
        """Look for a newer owner, and bring the store up to date. Return False if something is left to do."""
        with self._turn:
            if not self.owns:
                return False
            with self._lock:
                touched, self._touched = self._touched, set()
            left = sorted(touched)
            try:
                self._check_owner()
                while left:
                    self._bring(left[0])
                    left.pop(0)
                self._clear()
                self._failures, self._problem = 0, ""
                return True
            except FencedError as error:
                _log.error("another server owns the object store", problem=str(error))
            except Exception as error:  # the next look tries again, whatever it was, and the thread goes on
                self._failures, self._problem = self._failures + 1, str(error)
                _log.warning("object store not up to date", failures=self._failures, problem=str(error))
            with self._lock:
                self._touched.update(left)
            return False

    def settle(self, seconds: float) -> bool:
        """Bring the store up to date now, and return False if that failed, or took longer."""
        done: list[bool] = []
        thread = threading.Thread(target=lambda: done.append(self.look()), name="object store, last", daemon=True)
        thread.start()
        thread.join(seconds)
        return done == [True]

    def close(self) -> None:
        """Upload nothing more. An upload that hangs is left behind. Closing twice is harmless."""
        self._ended = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._ended:
            self._wake.wait(min(2.0**self._failures, _LONGEST_DELAY_SECONDS) if self._failures else LOOK_SECONDS)
            self._wake.clear()
            if not self._ended:
                self.look()

    def _check_owner(self) -> None:
        if (newest := self._epochs.newest()) != self._epoch:
            self.owns = False
            raise FencedError(
                "another server owns the object store now; connect to that one",
                reason=Reason.NOT_PRIMARY,
                metadata={"epoch": newest},
            )

    def _bring(self, session_id: str) -> None:
        """Bring the store to what the disk has of a session."""
        stored = self._index.sessions.get(session_id, {})
        if not self._archive.has(session_id):
            if session_id in self.closed():
                self._drop(session_id, stored)
            return
        with contextlib.suppress(FileNotFoundError):  # closed just before the end of an earlier server, but not removed
            self._disk.remove(self._closed / session_id)
        names = {info.name for info in self._archive.checkpoints(session_id).list()}
        for local in self._missing(session_id, stored):
            uploaded = self._uploaded(session_id, local)
            if uploaded is None:
                continue
            stored = {name: each for name, each in stored.items() if name in names} | {local.info.name: uploaded}
            self._publish(_with_checkpoints(session_id, stored))
            self._tell(session_id, uploaded.step)
        kept = {name: each for name, each in stored.items() if name in names}
        if kept and len(kept) < len(stored):
            self._publish(_with_checkpoints(session_id, kept))

    def _drop(self, session_id: str, stored: dict[str, StoredCheckpoint]) -> None:
        if stored:
            self._publish(_with_checkpoints(session_id, {}))
        self._objects.delete(reversed(self._objects.keys(session_folder(session_id))))
        self._disk.remove(self._closed / session_id)

    def _missing(self, session_id: str, stored: dict[str, StoredCheckpoint]) -> Iterable[_Local]:
        """Return the good checkpoints that the store has not, the newest first."""
        store, found = self._archive.checkpoints(session_id), list[_Local]()
        for info in store.list():
            if info.damage is not None:
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                local = _Local(info, store.folder / info.name, (store.folder / info.name / MANIFEST).read_bytes())
                if info.name not in stored or stored[info.name].manifest_crc32c != local.crc32c:
                    found.append(local)
        return sorted(found, key=lambda each: each.info.age, reverse=True)

    def _uploaded(self, session_id: str, local: _Local) -> StoredCheckpoint | None:
        """Upload a checkpoint, its manifest last; None if it was deleted meanwhile."""
        info, own = local.info, session_folder(session_id)
        folder = f"{own}checkpoints/{info.name}/{self._epoch:016x}-{self._written:012d}/"
        try:
            descriptor = self._disk.open(local.folder / BODY, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with io.FileIO(descriptor, "r") as file:  # it may be deleted while it is read
            nbytes = self._disk.size(descriptor)
            self._objects.upload(f"{folder}{BODY}", file, nbytes)
        self._objects.put(f"{folder}{MANIFEST}", local.manifest)
        if session_id not in self._index.sessions:
            self._objects.put(f"{own}{SESSION}", self._archive.text(session_id))
        _log.info("checkpoint uploaded", session_id=session_id, checkpoint=info.name, step=info.step, bytes=nbytes)
        return StoredCheckpoint(
            folder=folder,
            step=info.step,
            load=info.load,
            acquired=info.acquired,
            created=info.created,
            body_bytes=nbytes,
            manifest_crc32c=local.crc32c,
        )

    def _publish(self, change: Callable[[StoreIndex], StoreIndex]) -> None:
        """Write a changed index, and look for a newer owner; only then it counts."""
        with self._publishing:
            before, index = self._index, change(self._index)
            self._written += 1
            key = index_key(self._epoch, self._written)
            write_index(self._objects, key, index)
            try:
                self._check_owner()
            except OSError:  # it is there and does not count; the one before it does
                self._waste.indexes.insert(0, key)
                raise
            self._index = index
            self._waste.folders |= _folders(before) - _folders(index)
            self._waste.indexes.append(key)

    def _clear(self) -> None:
        """Delete what no index that counts names: checkpoints that were removed, older indexes, interrupted uploads."""
        waste, objects = self._waste, self._objects
        with self._publishing:
            folders, indexes = sorted(waste.folders), waste.indexes[:-_INDEXES_KEPT]
        for folder in folders:
            objects.delete([f"{folder}{MANIFEST}", f"{folder}{BODY}"])
            waste.folders.discard(folder)
        for key in indexes:
            objects.delete([key])
            waste.indexes.remove(key)
        if waste.older:
            first, used = index_key(self._epoch, 0), _folders(self._index)
            objects.delete([key for key in objects.keys(INDEX) if key < first])
            for key in objects.keys(SESSIONS):
                epoch = epoch_of(key)
                if epoch is not None and epoch < self._epoch and f"{key.rpartition('/')[0]}/" not in used:
                    objects.delete([key])
            waste.older = False


def _with_checkpoints(session_id: str, stored: dict[str, StoredCheckpoint]) -> Callable[[StoreIndex], StoreIndex]:
    return lambda index: index.with_checkpoints(session_id, stored)


def _folders(index: StoreIndex) -> set[str]:
    return {each.folder for checkpoints in index.sessions.values() for each in checkpoints.values()}
