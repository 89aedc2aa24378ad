"""The ownership of a data directory, and of the object store that has a copy of its checkpoints."""

from __future__ import annotations

import pathlib
import secrets
from typing import Final

from stepwire.errors import FencedError, InvalidRequestError, Reason, StepwireError
from stepwire_server.durability.archive import Archive
from stepwire_server.durability.checkpoint import CheckpointInfo
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.epochs import Epochs
from stepwire_server.durability.mirror import CLOSED, Mirror
from stepwire_server.durability.moved import MovedSessions
from stepwire_server.durability.object_store import ObjectStore
from stepwire_server.durability.succession import Succession
from stepwire_server.records.session_reasons import OF_SESSIONS

__all__ = ["LOG", "Ownership"]

LOG: Final = "log"

_OF_STATE: Final = OF_SESSIONS | {
    Reason.STATE_LOST,
    Reason.SESSION_DAMAGED,
    Reason.DURABILITY_FAILED,
    Reason.CHECKPOINT_DAMAGED,
    Reason.LOG_DAMAGED,
    Reason.INTERNAL,
}
"""The reasons of errors that tell of sessions, or of the disk."""

_STORE_SECONDS: Final = 300.0
"""The longest wait for uploads of other sessions, before that of one that has come from other servers."""

_EPOCHS, _SESSIONS, _WORK, _MOVED = "epochs", "sessions", "work", "moved"


class Ownership:
    """One server's ownership: from now on every earlier owner answers nothing any more.

    Attributes:
        folder: the data directory.
        epoch: the epoch of this owner.
        archive: the sessions on disk.
        mirror: the copy in an object store; None without one.
        moved: the sessions that live on elsewhere.
    """

    def __init__(self, disk: Disk, folder: pathlib.Path, store_url: str) -> None:
        """Acquire the directory, and the store of a URL, which is empty for none.

        Raises:
            FencedError: another server acquired one of them meanwhile.
            InvalidRequestError, UnsupportedFeatureError: the folder cannot be made, or the store cannot be opened or is
                that of another directory.
            DataLossError: the index of the store is damaged.
            OSError: the disk or the store failed.
        """
        self.folder = folder
        try:
            for path in (folder, *(folder / name for name in (_EPOCHS, LOG, _SESSIONS, _WORK, CLOSED, _MOVED))):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as problem:
            raise InvalidRequestError.of(
                "data_dir", f"{str(folder)!r} cannot be made: {problem.strerror}; name a folder of this user"
            ) from None
        self._epochs = Epochs(disk, folder / _EPOCHS)
        succession = Succession(disk, folder, ObjectStore.open(store_url)) if store_url else None
        if succession is None:
            self.epoch = self._epochs.acquire(secrets.token_hex(8))
        else:
            self.epoch = succession.acquire(self._epochs, (_SESSIONS, LOG, CLOSED, _MOVED))
        work = self._epochs.work(self.epoch, folder / _WORK)
        self.archive = Archive(disk, folder / _SESSIONS, work)
        self.archive.tidy()
        self.moved = MovedSessions.read(disk, folder / _MOVED, work)  # behind `work`: an older owner can add none
        if succession is not None:
            self.moved.bring(succession.moved)
        self.mirror = None
        if succession is not None:
            self.mirror = Mirror(disk, folder, self.archive, succession, self.epoch, self.moved.durable())
            self.moved.publish(self.mirror.keep_moved)
        for session_id in filter(self.archive.has, self.moved.ids()):
            self.remove(session_id)

    def holds(self) -> bool:
        """Tell whether no newer owner is there, as far as it can be seen."""
        return self._epochs.is_owner(self.epoch) and (self.mirror is None or self.mirror.owns)

    def check(self) -> None:
        """Refuse a change of what is on disk when another server owns it.

        Raises:
            FencedError: NOT_PRIMARY.
        """
        if not self.holds():
            raise FencedError(
                "another server owns the data directory now; connect to that one", reason=Reason.NOT_PRIMARY
            )

    def told(self, error: StepwireError) -> StepwireError:
        """Return the error that may be told in the place of another one: NOT_PRIMARY by an owner that was overtaken.

        Steps, holds, loads and whole sessions may have come with a newer owner. So whatever an older one says of them,
        its clients must not believe; its disk failed because the newer one moved folders away.
        """
        if error.reason not in _OF_STATE:
            return error
        try:
            self.check()
        except FencedError as fenced:
            return fenced
        except OSError:  # nobody can tell
            return error
        return error

    def has(self, session_id: str) -> bool:
        """Tell whether there is a session of this id, even one that could not be brought here from the store."""
        return self.archive.has(session_id) or self.loss(session_id) is not None

    def loss(self, session_id: str) -> StepwireError | None:
        """Return the reason why a session could not be brought here from the store; None for any other."""
        return None if self.mirror is None else self.mirror.lost.get(session_id)

    def remove(self, session_id: str) -> None:
        """Forget a session, here and in the store.

        Raises:
            OSError: the disk failed, and the session is still there.
        """
        if self.mirror is not None:
            self.mirror.close_session(session_id)
        if self.archive.has(session_id):
            self.archive.remove(session_id)
        if self.mirror is not None:
            self.mirror.lost.pop(session_id, None)
            self.mirror.touch(session_id)

    def check_stored(self, session_id: str) -> None:
        """Bring a session to the object store now, if there is one.

        Raises:
            DataLossError: DURABILITY_FAILED, the store failed, or needs longer than a move may.
        """
        if self.mirror is not None:
            self.mirror.check_stored(session_id, _STORE_SECONDS)

    def touch(self, session_id: str) -> None:
        """Note that the checkpoints of a session have changed."""
        if self.mirror is not None:
            self.mirror.touch(session_id)

    def stored_step(self, session_id: str) -> int:
        """Return the last step of a session that the object store has; 0 for none."""
        return 0 if self.mirror is None else self.mirror.stored_step(session_id)

    def with_store(self, session_id: str, info: CheckpointInfo) -> CheckpointInfo:
        """Return the line of a checkpoint with its way into the store."""
        if self.mirror is None:
            return info
        state = self.mirror.state(session_id, info)
        return info._replace(stored=state.stored, store_problem=state.problem)
