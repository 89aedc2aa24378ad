"""The checkpoints of sessions as their users see them: saved under names, listed, verified, deleted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final, NamedTuple

from stepwire.errors import DataLossError, InvalidRequestError, Reason, UnsupportedFeatureError
from stepwire_server.durability.checkpoint import CheckpointInfo
from stepwire_server.durability.checkpoints import AUTOMATIC_PREFIX, CheckpointStore, automatic_name
from stepwire_server.durability.folders import name_taken
from stepwire_server.sessions.data_directory import DataDirectory
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.session import Session

__all__ = ["NamedCheckpoints", "SavedCheckpoint", "telling_of_the_disk"]


_FOUND_DAMAGED: Final = "its arrays were damaged when the session was restored; verify it for the first bad one"


class SavedCheckpoint(NamedTuple):
    """A checkpoint that was saved.

    Attributes:
        info: its line in a list.
        replayed: it had been saved before.
    """

    info: CheckpointInfo
    replayed: bool


class NamedCheckpoints:
    """The checkpoints of all sessions on disk. Thread-safe."""

    def __init__(self, registry: Registry) -> None:
        """Serve the sessions of a registry."""
        self._registry = registry

    def save(self, session: Session, name: str) -> SavedCheckpoint:
        """Save a checkpoint of the present moment; one of this name and moment is a replay.

        Raises:
            InvalidRequestError: the name is none, is reserved, or is that of another checkpoint.
            UnsupportedFeatureError: the session is in memory alone.
            StepwireError: as `checkpointing.save`.
        """
        directory = self.directory_of(session.session_id)
        store = directory.checkpoints(session.session_id)
        if name.startswith(AUTOMATIC_PREFIX):
            raise InvalidRequestError.of(
                "name", f"{name[:80]!r}: names that begin with {AUTOMATIC_PREFIX!r} are the server's own; use another"
            )
        with telling_of_the_disk(), directory.checkpointer.turn():
            if (found := _found(store, name)) is not None and _is_present(session, found):
                directory.check_owner()
                return SavedCheckpoint(directory.own.with_store(session.session_id, found), replayed=True)
            session.exchange.snapshot()  # of this server's session still, and nothing of it half applied
            if found is not None:
                raise name_taken(name)
            saved = directory.save(session, store, name)
            directory.note_saved(session, saved)
            with store.open(name) as checkpoint:
                return SavedCheckpoint(checkpoint.info(), replayed=False)

    def list(self, session_id: str) -> tuple[CheckpointInfo, ...]:
        """Return the checkpoints of a session by name; a parked session stays parked.

        Raises:
            SessionNotFoundError: there is no such session.
            UnsupportedFeatureError: the session is in memory alone.
            DataLossError: DURABILITY_FAILED, the disk could not be read.
        """
        with telling_of_the_disk():
            directory = self.directory_of(session_id)
            found = directory.checkpoints(session_id).list()
            told = (
                info._replace(damage=_FOUND_DAMAGED)
                if info.damage is None and directory.is_bad(session_id, info.name)
                else info
                for info in found
            )
            return tuple(directory.own.with_store(session_id, info) for info in told)

    def verify(self, session_id: str, name: str) -> CheckpointInfo:
        """Read all of a checkpoint.

        Raises:
            SessionNotFoundError, UnsupportedFeatureError: as `list`.
            InvalidRequestError: no checkpoint has the name.
            DataLossError: it is damaged, which names the first bad array; or the disk could not be read.
        """
        directory = self.directory_of(session_id)
        with telling_of_the_disk(), directory.checkpoints(session_id).open(name) as checkpoint:
            checkpoint.body.verify()
            return directory.own.with_store(session_id, checkpoint.info())

    def delete(self, session_id: str, name: str) -> None:
        """Delete a checkpoint; the newest state of the session stays, under the name of an automatic one.

        Raises:
            SessionNotFoundError, UnsupportedFeatureError: as `list`.
            InvalidRequestError: no checkpoint has the name, or it is the newest automatic one.
            FencedError: another server owns the data directory.
            DataLossError: DURABILITY_FAILED, the disk failed.
        """
        directory = self.directory_of(session_id)
        store = directory.checkpoints(session_id)
        with telling_of_the_disk(), directory.checkpointer.turn():
            directory.check_owner()
            if not directory.is_bad(session_id, name):
                _keep_newest(store, name)
            store.delete(name)
            directory.own.touch(session_id)

    def directory_of(self, session_id: str) -> DataDirectory:
        """Return the data directory, if it has the session.

        Raises:
            SessionNotFoundError: there is no such session.
            UnsupportedFeatureError: the session is in memory alone.
        """
        directory = self._registry.directory
        if directory is not None and directory.has(session_id):
            return directory
        self._registry.get(session_id)
        raise UnsupportedFeatureError(
            f"session {session_id} is in memory alone and has no checkpoints; create it with durability 'checkpoint' "
            "or 'journal'",
            metadata={"field": "session_id", "feature": "durability_checkpoint"},
        )


@contextlib.contextmanager
def telling_of_the_disk() -> Iterator[None]:
    """Tell the failures of a disk as what a caller may see."""
    try:
        yield
    except OSError as error:
        raise DataLossError(
            f"the data directory failed: {error}; mend the disk, and call again", reason=Reason.DURABILITY_FAILED
        ) from error


def _found(store: CheckpointStore, name: str) -> CheckpointInfo | None:
    return next((info for info in store.list() if info.name == name), None)


def _is_present(session: Session, info: CheckpointInfo) -> bool:
    """Tell whether a checkpoint has the last commit of a session."""
    ledger = session.ledger
    ledger.check_open()
    return info.damage is None and (info.step, info.load) == (ledger.applied_step, ledger.applied_load)


def _keep_newest(store: CheckpointStore, name: str) -> None:
    """Give the state of a checkpoint that is about to be deleted another name, if the session comes back from it.

    Raises:
        InvalidRequestError: it has that name.
    """
    good = [info for info in store.list() if info.damage is None]
    doomed = next((info for info in good if info.name == name), None)
    if doomed is None or any(info.age[:3] >= doomed.age[:3] for info in good if info != doomed):
        return
    automatic = automatic_name(doomed.step, doomed.load)
    if name.startswith(automatic):
        raise InvalidRequestError.of(
            "name", f"{name!r} is the newest checkpoint, from which the session comes back; save another one first"
        )
    taken = {info.name for info in store.list()}
    store.link(name, store, f"{automatic}-{doomed.acquired:x}" if automatic in taken else automatic)
