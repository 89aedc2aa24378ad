"""The data directory of a server: its epoch, its log, and the sessions that it keeps beyond the server's end.

The order of the start is the fence: the epoch is created first, the log is read second. A session comes back from its
newest good checkpoint, and what the log has beyond that is made again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import structlog

from stepwire.errors import DataLossError, Reason, StepwireError
from stepwire_server.config import ServerConfig
from stepwire_server.durability.archive import ArchivedSession
from stepwire_server.durability.checkpoints import CheckpointStore
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.ownership import LOG, Ownership
from stepwire_server.durability.read_ahead import ReadAhead
from stepwire_server.durability.reading import LogRecord, read_log
from stepwire_server.durability.records import LogPosition
from stepwire_server.durability.session_log import SessionLog
from stepwire_server.durability.writer import LogLimits, LogStatistics, LogWriter
from stepwire_server.observability.histograms import Histogram
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.sessions.beginning import Beginning
from stepwire_server.sessions.checkpointer import Checkpointer
from stepwire_server.sessions.checkpointing import Saved, save
from stepwire_server.sessions.closing import closed_on_failure
from stepwire_server.sessions.moments import free_name, has_moment
from stepwire_server.sessions.recovery import Recovery
from stepwire_server.sessions.redo import Codec, Redo
from stepwire_server.sessions.restorer import Make, Restorer
from stepwire_server.sessions.session import Session

__all__ = ["DataDirectory"]

_log = structlog.get_logger()
_NO_CHECKPOINT: Final = Saved(0, 0, 0)
_RECOVERED: Final = Saved(0, 0, -1)  # the log was made again for it: a checkpoint is due, since older epochs wait


class DataDirectory:
    """The sessions on disk. Its calls are serialised by the registry, but for those of the checkpointer's thread.

    Attributes:
        epoch: the epoch of this owner.
        codec: the contract's messages, for what is on disk.
        checkpointer: takes the checkpoints of the sessions that are in memory.
        own: the ownership of what is on the disk, and of its copy in an object store.
    """

    def __init__(
        self, config: ServerConfig, codec: Codec, clock: Callable[[], float], disk: Disk | None = None
    ) -> None:
        """Own the directory from now on: every earlier owner answers nothing any more.

        Raises:
            StepwireError, OSError: as `Ownership`.
        """
        self._config = config
        self.codec = codec
        self._disk = disk or Disk()
        self.own = Ownership(self._disk, pathlib.Path(config.data_dir).absolute(), config.checkpoint_store)
        self.epoch, self._archive, self._log_folder = self.own.epoch, self.own.archive, self.own.folder / LOG
        self._restorer = Restorer(self._archive, codec, self.epoch)
        self._entries = itertools.count(1)
        self._writer: LogWriter | None = None
        self._lost: dict[str, StepwireError] = {}
        self._generations: dict[str, dict[int, int]] = {}  # of parked sessions' holds, which the disk does not have
        self._unsafe: set[str] = set()
        self._make: Make | None = None
        self._reading, self._readers = threading.Lock(), 0  # no segment is removed while somebody reads the log
        self.checkpointer = Checkpointer(config, clock, self.save_automatic, self._release)
        if self.own.mirror is not None:
            self.own.mirror.on_stored(self._stored)

    # --- the start ---------------------------------------------------------------------------------------

    def recover(self, make: Make) -> list[tuple[ArchivedSession, Session]]:
        """Bring the sessions back that the log has commits of, and begin a log of this epoch.

        The others are parked: see `revive`. A session that cannot be brought back stays on disk, and tells its caller
        why.

        Raises:
            DataLossError: the log is damaged, or cannot be read.
            OSError: the disk failed.
        """
        began, self._make, known = time.monotonic(), make, self._archive.ids()
        recovery = Recovery(
            functools.partial(ReadAhead, self._disk, self._log_folder),
            functools.partial(self._restorer.restored, make=make),
            self._save_recovered,
            self._restorer.check_reached,
            self.codec,
        )
        recovered = recovery.run(known)
        self._lost = recovered.lost
        self._unsafe = recovered.short.union(session.session_id for session in recovered.sessions)
        limits = LogLimits(segment_bytes=self._config.journal_segment_bytes)
        self._writer = LogWriter(
            self._disk, self._log_folder, self.epoch, self.own.holds, after=recovered.end, limits=limits
        )
        self._writer.on_failure(lambda error: _log.error("nothing more becomes durable", problem=str(error)))
        for session in recovered.sessions:
            self._open(session, _RECOVERED)
        _log.info(
            "recovered",
            data_dir=str(self.own.folder),
            epoch=self.epoch,
            sessions=len(recovered.sessions),
            parked=len(known) - len(recovered.sessions) - len(self._lost),
            lost=len(self._lost),
            commits=recovered.commits,
            seconds=round(time.monotonic() - began, 3),
        )
        return [(self._archive.get(session.session_id), session) for session in recovered.sessions]

    @property
    def sync_seconds(self) -> Histogram:
        """The times of the log's syncs."""
        return self._log_writer.sync_seconds

    def log_statistics(self) -> LogStatistics:
        """Return the work of the log so far."""
        return self._log_writer.statistics()

    # --- sessions ----------------------------------------------------------------------------------------

    def add(self, session: Session, request_id: str, beginning: Beginning | None = None) -> None:
        """Keep a new session, with the state that it begins with; it is there for good when this returns.

        Raises:
            OSError: the disk failed; nothing stays.
            StepwireError: as `beginning.keep`; nothing stays.
        """
        self._archive.add(
            ArchivedSession(
                session_id=session.session_id,
                request_id=request_id,
                config=self.codec.encode_config(session.config),
                create_time=time.time(),
                attach_key=session.ledger.members.tokens.key,
            ),
            None if beginning is None else functools.partial(beginning.keep, session),
        )
        self._open(session, _NO_CHECKPOINT if beginning is None else self._saved(session))

    def remove(self, session_id: str) -> None:
        """Forget a session for good.

        Raises:
            FencedError: another server owns the directory.
            DataLossError: the disk failed, and the session is still there.
        """
        self.check_owner()
        try:
            self.own.remove(session_id)
        except OSError as error:
            raise DataLossError(
                f"session {session_id} could not be removed from the disk: {error}; it is still there, end it again",
                reason=Reason.DURABILITY_FAILED,
            ) from error
        self._lost.pop(session_id, None)
        self._generations.pop(session_id, None)
        self._restorer.forget(session_id)
        self._unsafe.discard(session_id)

    def drop_half(self, session: Session) -> bool:
        """Have a session leave memory without its half-applied step, if the disk has all the others.

        Returns:
            False if the step is no longer half applied, or others would be lost with it: nothing has changed then.

        Raises:
            FencedError, DataLossError: as `Progress.settle`; nothing has changed.
        """
        session_id, mark, ledger = session.session_id, session.progress.last, session.ledger
        moment, last = (ledger.applied_step, ledger.applied_load), self.checkpointer.last(session)
        if session.config.durability.level != "journal" and (last is None or last[:2] != moment):
            return False
        session.progress.settle(mark)
        was_safe = session_id not in self._unsafe
        self._unsafe.add(session_id)  # the log has what its checkpoints lack
        if not session.passage.retire(*moment, mark.number, half=True):
            if was_safe:
                self._unsafe.discard(session_id)
            return False
        self.forget(session)
        return True

    def forget(self, session: Session) -> None:
        """Look after a session in memory no more: it is closed, and what the disk has of it stays."""
        self.checkpointer.remove(session)
        self._generations[session.session_id] = session.ledger.members.generations()

    def archived(self, session_id: str) -> ArchivedSession:
        """Return a session as its folder describes it.

        Raises:
            SessionNotFoundError: there is none of this id.
            DataLossError: its folder is damaged.
        """
        return self._archive.get(session_id)

    def parked(self) -> list[ArchivedSession]:
        """Return all sessions on disk, those in memory too; one whose folder is damaged is left out."""
        found = []
        for session_id in self._archive.ids():
            with contextlib.suppress(StepwireError):
                found.append(self._archive.get(session_id))
        return found

    def revive(self, session_id: str, make: Make) -> tuple[ArchivedSession, Session]:
        """Bring a parked session back into memory.

        Raises:
            SessionNotFoundError: there is none of this id.
            ResourceExhaustedError: no room just now.
            DataLossError: the session could not be brought back.
        """
        if (loss := self._lost.get(session_id) or self.own.loss(session_id)) is not None:
            raise type(loss)(str(loss), reason=loss.reason, metadata=loss.metadata)
        session = self._brought_back(session_id, make)
        session.ledger.members.resume(self._generations.pop(session_id, {}))
        self._open(session, _RECOVERED if session_id in self._unsafe else self._saved(session))
        return self._archive.get(session_id), session

    def has(self, session_id: str) -> bool:
        """Tell whether a session is on disk, be it in memory or not."""
        return self.own.has(session_id)

    def checkpoints(self, session_id: str) -> CheckpointStore:
        """Return the checkpoints of a session."""
        return self._archive.checkpoints(session_id)

    def is_bad(self, session_id: str, name: str) -> bool:
        """Tell whether a checkpoint's arrays were found to be damaged."""
        return name in self._restorer.bad(session_id)

    def check_owner(self) -> None:
        """Refuse a change of what is on disk when another server owns the directory.

        Raises:
            FencedError: NOT_PRIMARY.
        """
        self.own.check()

    def save(self, session: Session, store: CheckpointStore, name: str) -> Saved:
        """Save a checkpoint of a session's present moment into a store; the caller has the checkpointer's turn.

        Raises:
            StepwireError, OSError: as `checkpointing.save`.
        """
        return save(session, store, name, self.config_tree(session.config))

    def config_tree(self, config: SessionConfig) -> dict[str, Any]:
        """Return a session's config as a manifest has it."""
        tree: dict[str, Any] = json.loads(self.codec.config_text(config))
        return tree

    def made(self, session_id: str, config: SessionConfig) -> Session:
        """Make a session that no log and no checkpointer knows, at step 0, for the caller to close.

        Raises:
            ResourceExhaustedError: it does not fit.
        """
        assert self._make is not None
        return self._make(session_id, config)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep every segment of the log for a block, in which payloads of records are read."""
        with self._reading:
            self._readers += 1
        try:
            yield
        finally:
            with self._reading:
                self._readers -= 1

    def records(self, session_id: str) -> list[LogRecord]:
        """Return what the log still has of a session, up to what is durable now; see `reading`.

        Raises:
            DataLossError: the log is damaged, or cannot be read.
        """
        reader = read_log(self._disk, self._log_folder, up_to=self._log_writer.durable_position)
        return [record for record in reader if record.header.session.hex() == session_id]

    def start(self) -> None:
        """Take checkpoints when they are due."""
        self.checkpointer.start()
        if self.own.mirror is not None:
            self.own.mirror.start()

    def settle(self, seconds: float) -> bool:
        """Bring the object store up to date, if there is one; return False if that failed, or took longer."""
        return self.own.mirror is None or self.own.mirror.settle(seconds)

    def close(self) -> None:
        """End the checkpoints and the log. Closing twice is harmless."""
        self.checkpointer.close()
        if self.own.mirror is not None:
            self.own.mirror.close()
        if self._writer is not None:
            self._writer.close()

    @property
    def _log_writer(self) -> LogWriter:
        assert self._writer is not None
        return self._writer

    def _saved(self, session: Session) -> Saved:
        """Describe a checkpoint of the present moment: it makes the log up to here superfluous, as far as it can."""
        position, needed = self._log_writer.position.number, session.needed_record
        position = position if needed is None else min(position, needed - 1)
        return Saved(session.ledger.applied_step, session.ledger.applied_load, position)

    def _open(self, session: Session, saved: Saved) -> None:
        """Have a session write into the log, and be looked after."""
        journals = session.config.durability.level == "journal"
        log = SessionLog(self._log_writer, session.session_id, self._entries, self.own.holds)
        session.progress.attach(log, functools.partial(self.checkpointer.checkpoint, session), journals=journals)
        session.progress.wake_every(session.config.durability.every_steps or 0, self.checkpointer.wake)
        ledger, step = session.ledger, session.ledger.applied_step
        ledger.kept_step = step
        self.note_saved(session, saved)
        ledger.durable_step = self.durable_step(session.session_id, session.config, step)
        self.checkpointer.add(session, saved)

    def note_saved(self, session: Session, saved: Saved) -> None:
        """Note that a checkpoint is on the disk."""
        session.progress.checkpointed(saved.step, durable=not self._waits_for_store(session.config))
        self.own.touch(session.session_id)

    def durable_step(self, session_id: str, config: SessionConfig, step: int) -> int:
        """Return the last durable step of a session that the disk has up to a step."""
        return min(step, self.own.stored_step(session_id)) if self._waits_for_store(config) else step

    def _waits_for_store(self, config: SessionConfig) -> bool:
        """Tell whether steps are durable once a checkpoint is in the object store: there is one, and no journal."""
        return self.own.mirror is not None and config.durability.level != "journal"

    def _stored(self, session_id: str, step: int) -> None:
        if (session := self.checkpointer.of(session_id)) is not None:
            session.progress.checkpointed(step)

    def _brought_back(self, session_id: str, make: Make) -> Session:
        """Restore a parked session; where its newest checkpoint is damaged, or behind, the log has the rest."""
        session = self._restorer.restored(session_id, make)
        with closed_on_failure(session):
            if self._restorer.bad(session_id):
                self._unsafe.add(session_id)
            if session_id in self._unsafe:
                redo = Redo(session, self.codec)
                with self.reading():
                    for record in self.records(session_id):
                        redo.add(record)
            self._restorer.check_reached(session)
        return session

    def save_automatic(self, session: Session) -> Saved:
        """Save an automatic checkpoint, unless there is one of this moment, and delete those that are too many.

        The caller has the checkpointer's turn.

        Raises:
            StepwireError, OSError: as `checkpointing.save`.
        """
        store, ledger = self._archive.checkpoints(session.session_id), session.ledger
        saved = self._saved(session)  # for one that an earlier server, or a deletion, has left
        there = has_moment(session, store, self._restorer.bad(session.session_id))
        if not there or (ledger.applied_step, ledger.applied_load) != (saved.step, saved.load):
            saved = self.save(session, store, free_name(session, store))
        self._unsafe.discard(session.session_id)
        store.prune(self._config.checkpoints_kept)
        self.note_saved(session, saved)
        return saved

    def _save_recovered(self, session: Session) -> None:
        """Save a session that has no log yet."""
        store = self._archive.checkpoints(session.session_id)
        if not has_moment(session, store, self._restorer.bad(session.session_id)):
            self.save(session, store, free_name(session, store))

    def _release(self, number: int) -> None:
        """Let go of the records before a number, once no session needs those of older epochs."""
        with self._reading:
            if not (self._unsafe or self._lost or self._readers) and self.own.holds():
                self._log_writer.release(LogPosition(self.epoch, number))
