"""The journal of a session, made again beside the server that may own it: nothing is written, and no epoch begins."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from stepwire.errors import DataLossError, InvalidRequestError, Reason
from stepwire.optimizers import Hyperparameters
from stepwire_server.devices.pool import DevicePool
from stepwire_server.durability.archive import Archive
from stepwire_server.durability.checkpoint import CheckpointInfo
from stepwire_server.durability.checkpoints import CheckpointStore
from stepwire_server.durability.disk import Disk
from stepwire_server.durability.read_only import ReadOnlyDisk
from stepwire_server.durability.reading import LogRecord, read_log
from stepwire_server.durability.records import LogPosition
from stepwire_server.records.committed import Committed
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.checkpointing import restore
from stepwire_server.sessions.earlier import reached_steps
from stepwire_server.sessions.redo import Codec, Redo
from stepwire_server.sessions.session import Session

__all__ = ["Replayer"]

_EPOCH: Final = 1


class Replayer:
    """Makes journals of a data directory again. It reads alone.

    Attributes:
        folder: the data directory.
    """

    def __init__(self, folder: pathlib.Path, codec: Codec, pool: DevicePool, disk: ReadOnlyDisk | None = None) -> None:
        """Read nothing yet.

        Args:
            folder: the data directory.
            codec: the contract's messages.
            pool: the devices; the first one is used.
            disk: the file system.
        """
        self.folder = folder
        self._codec = codec
        self._pool = pool
        self._disk = disk or ReadOnlyDisk()
        self._archive = Archive(self._disk, folder / "sessions", folder / "work")

    def replay(
        self, session_id: str, checkpoint: str = "", changes: Mapping[str, Any] | None = None
    ) -> list[StepResult]:
        """Make the steps after a checkpoint again, and return their results.

        Args:
            session_id: the session's id.
            checkpoint: the checkpoint; empty for the oldest state that the journal goes on from.
            changes: hyper-parameters in the place of those of every step and group, by name.

        Raises:
            SessionNotFoundError: there is no such session.
            InvalidRequestError: the session has no journal, the journal does not go on from the checkpoint, or a change
                is none.
            DataLossError: the checkpoint or the log is damaged, or was removed meanwhile.
            ResourceExhaustedError: there is no room.
        """
        archived = self._archive.get(session_id)
        config = self._codec.decode_config(archived.config)
        if config.durability.level != "journal":
            raise InvalidRequestError.of(
                "session_id", f"{session_id} has durability {config.durability.level!r}, and no journal to make again"
            )
        _changed(config, config.groups, changes or {})
        openings = _Changed(self._codec, changes) if changes else self._codec
        records = _records(self._disk, self.folder / "log", session_id)
        store = self._archive.checkpoints(session_id)
        base = _named(store, checkpoint, records) if checkpoint else _oldest(store, records)
        results: list[StepResult] = []

        def note(committed: Committed) -> None:
            results.append(committed.result)

        device = self._pool.choose("")
        made = Session(session_id, config, device, epoch=_EPOCH, clock=time.monotonic, sinks=(note,))
        with contextlib.closing(made) as session:
            if base:
                with store.open(base) as opened:
                    restore(session, opened)
            redo = Redo(session, openings)
            for record in records:
                redo.add(record)
        return results


class _Changed:
    """Openings of steps with other hyper-parameters. A changed learning rate is that of every step: no schedule."""

    def __init__(self, codec: Codec, changes: Mapping[str, Any]) -> None:
        self._codec = codec
        self._changes = changes

    def decode_opening(self, data: bytes, config: SessionConfig) -> StepRequest:
        """See `Openings`."""
        request = self._codec.decode_opening(data, config)
        own_lr = (True,) * len(request.groups) if "lr" in self._changes else request.own_lr
        return request._replace(groups=_changed(config, request.groups, self._changes), own_lr=own_lr)


def _changed(
    config: SessionConfig, groups: Sequence[Hyperparameters], changes: Mapping[str, Any]
) -> tuple[Hyperparameters, ...]:
    """Return the numbers of all groups, changed.

    Raises:
        InvalidRequestError: the rule has not a number, it is out of range, or it needs a slot that is not there.
    """
    changed = tuple(config.optimizer.override(group, changes, "set") for group in groups)
    if not config.momentum and any(group.momentum for group in changed):
        raise InvalidRequestError.of("set.momentum", "the session keeps no momentum buffer; leave momentum out")
    return changed


def _records(disk: Disk, folder: pathlib.Path, session_id: str) -> list[LogRecord]:
    """Return the records of a session, while a server may append to the log or remove its segments.

    A record that is being written looks like damage if the server goes on behind it meanwhile. So damage counts when a
    second look gets no further.

    Raises:
        DataLossError: the log is damaged, or cannot be read.
    """
    last = LogPosition(0, -1)
    while True:
        found, end = list[LogRecord](), LogPosition(0, 0)
        try:
            for record in read_log(disk, folder):
                end = record.position
                if record.header.session.hex() == session_id:
                    found.append(record)
            return found
        except DataLossError as error:
            removed = isinstance(error.__cause__, FileNotFoundError)
            if not (removed or error.reason is Reason.LOG_DAMAGED) or end <= last:
                raise
            last = end


def _named(store: CheckpointStore, name: str, records: Iterable[LogRecord]) -> str:
    """Check that the journal goes on from a checkpoint.

    Raises:
        InvalidRequestError: there is no such checkpoint, or the journal has not the steps behind it.
        DataLossError: the checkpoint is damaged.
    """
    with store.open(name) as opened:
        info = opened.info()
    if not reached_steps(info, records):
        raise InvalidRequestError.of("from", f"the journal has no step that follows {name!r}, of step {info.step}")
    return name


def _oldest(store: CheckpointStore, records: Sequence[LogRecord]) -> str:
    """Return the checkpoint that most steps follow in the journal; empty for the beginning of the session.

    Raises:
        InvalidRequestError: no step follows any.
    """
    good = [info for info in store.list() if info.damage is None]
    reached = {info.name: reached_steps(info, records) for info in (CheckpointInfo(""), *good)}
    best = max(reached, key=lambda name: (max(reached[name], default=0), len(reached[name])))
    if not reached[best]:
        raise InvalidRequestError.of("session_id", "the journal has no step that follows a checkpoint")
    return best
