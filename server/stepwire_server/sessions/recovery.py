"""The recovery of sessions at the start of a server: checkpoints are restored, and the log is made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import structlog

from stepwire.errors import ResourceExhaustedError, StepwireError
from stepwire_server.durability.read_ahead import ReadAhead
from stepwire_server.durability.records import LogPosition
from stepwire_server.sessions.redo import Codec, Redo
from stepwire_server.sessions.session import Session

__all__ = ["Recovered", "Recovery"]

_log = structlog.get_logger()


class Recovered(NamedTuple):
    """The outcome of a recovery.

    Attributes:
        sessions: the sessions that are in memory.
        parked: the number of those that were brought up to date and parked again, for want of room.
        commits: the number of commits made again.
        lost: the reason for each session that could not be brought back, by its id.
        short: the ids of those that there is no room for, even alone: the log has what their checkpoints lack.
        end: the last record of the log that was read.
    """

    sessions: list[Session]
    parked: int
    commits: int
    lost: dict[str, StepwireError]
    short: set[str]
    end: LogPosition


class Recovery:
    """Brings back the sessions that the log has commits of.

    Where there is no room for all of them at a time, those that are up to date are saved and leave memory, and the log
    is read once more for the others.
    """

    def __init__(
        self,
        read: Callable[[], ReadAhead],
        restored: Callable[[str], Session],
        save: Callable[[Session], object],
        check: Callable[[Session], object],
        codec: Codec,
    ) -> None:
        """Bring back sessions.

        Args:
            read: begins to read the log.
            restored: makes a session from its newest checkpoint.
            save: saves a checkpoint of a session.
            check: refuses a session that its disk had further.
            codec: decodes steps.
        """
        self._read, self._restored, self._save, self._check, self._codec = read, restored, save, check, codec
        self._lost: dict[str, StepwireError] = {}
        self._end: LogPosition | None = None

    def run(self, known: Iterable[str]) -> Recovered:
        """Bring back those of the known sessions that the log has commits of.

        Raises:
            DataLossError: the log is damaged, or cannot be read.
            OSError: the disk failed.
        """
        wanted, parked, commits = set(known), 0, 0
        while True:
            found, short = self._pass(wanted)
            commits += sum(redo.commits for redo in found.values())
            if not short or not found:
                break
            for redo in found.values():
                self._save(redo.session)
                redo.session.close()
            parked, wanted = parked + len(found), set(short)
        for session_id, error in short.items():
            _log.error("session not recovered yet", session_id=session_id, problem=str(error))
        assert self._end is not None
        return Recovered([redo.session for redo in found.values()], parked, commits, self._lost, set(short), self._end)

    def _pass(self, wanted: set[str]) -> tuple[dict[str, Redo], dict[str, StepwireError]]:
        """Read the log once; return the sessions that are back, and those that there was no room for."""
        found, short = dict[str, Redo](), dict[str, StepwireError]()
        reader = self._read()
        for record in reader:
            if self._end is not None and record.position > self._end:
                break  # an older owner wrote it after the first pass, and answered nobody
            session_id = record.header.session.hex()
            if session_id not in wanted or session_id in self._lost or session_id in short:
                continue
            try:
                if session_id not in found:
                    found[session_id] = Redo(self._restored(session_id), self._codec)
                found[session_id].add(record)
            except ResourceExhaustedError as error:
                short[session_id] = error
                self._drop(found, session_id)
            except StepwireError as error:
                self._note_loss(found, session_id, error)
        self._end = self._end or reader.end
        for session_id, redo in list(found.items()):
            try:
                self._check(redo.session)
            except StepwireError as error:
                self._note_loss(found, session_id, error)
        return found, short

    def _note_loss(self, found: dict[str, Redo], session_id: str, error: StepwireError) -> None:
        _log.error("session not recovered", session_id=session_id, problem=str(error))
        self._lost[session_id] = error
        self._drop(found, session_id)

    def _drop(self, found: dict[str, Redo], session_id: str) -> None:
        if (redo := found.pop(session_id, None)) is not None:
            redo.session.close()
