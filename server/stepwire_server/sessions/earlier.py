"""Earlier states of a session: checkpoints, and with a journal the steps that the log makes again."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from stepwire.errors import InvalidRequestError
from stepwire_server.durability.checkpoint import Checkpoint, CheckpointInfo
from stepwire_server.durability.entries import LoadEntry, StepEntry, decode_entry
from stepwire_server.durability.reading import LogRecord
from stepwire_server.durability.records import Kind
from stepwire_server.sessions.checkpointing import restore
from stepwire_server.sessions.data_directory import DataDirectory
from stepwire_server.sessions.redo import Redo
from stepwire_server.sessions.session import Session

__all__ = ["EarlierState", "Origin", "find_earlier", "reached_steps"]

_MOST_NAMED = 20


class Origin(NamedTuple):
    """An earlier state as it is asked for: by one of both.

    Attributes:
        checkpoint: the name of a checkpoint; empty for none.
        step: the number of a step; None for none.
    """

    checkpoint: str = ""
    step: int | None = None


class EarlierState(NamedTuple):
    """An earlier state of a session that can be reached.

    Attributes:
        directory: the sessions on disk.
        session_id: the session's id.
        checkpoint: the name of the checkpoint that is restored first; empty for the state before the first step.
        records: what the log has of the session.
        step: the step up to which the records are made again; None for the checkpoint's own state.
    """

    directory: DataDirectory
    session_id: str
    checkpoint: str
    records: Sequence[LogRecord] = ()
    step: int | None = None

    @property
    def is_checkpoint(self) -> bool:
        """A checkpoint has this state; nothing is made again."""
        return self.step is None

    def open(self) -> Checkpoint:
        """Open the checkpoint.

        Raises:
            InvalidRequestError: it was deleted meanwhile.
            DataLossError: it is damaged.
            OSError: the disk failed.
        """
        return self.directory.checkpoints(self.session_id).open(self.checkpoint)

    def bring(self, session: Session) -> None:
        """Bring a new session, of the same tensors and options, into this state.

        Raises:
            DataLossError: the checkpoint or the log is damaged.
            ResourceExhaustedError: slots that are not float32 do not fit a second time beside the state.
            OSError: the disk failed.
        """
        if self.checkpoint:
            with self.open() as checkpoint:
                restore(session, checkpoint)
        if self.step is None:
            return
        redo = Redo(session, self.directory.codec)
        with session.untold():
            for record in self.records:
                if (number := _step_of(record)) is not None and number > self.step:
                    break
                redo.add(record)

    @contextlib.contextmanager
    def made_again(self, session: Session) -> Iterator[Session]:
        """Make a second session like `session` in this state, for a block.

        Raises:
            StepwireError, OSError: as `bring`, or there is no room for it.
        """
        with contextlib.closing(self.directory.made(self.session_id, session.config)) as again:
            self.bring(again)
            yield again


def find_earlier(directory: DataDirectory, session_id: str, origin: Origin, *, journals: bool) -> EarlierState:
    """Find an earlier state of a session.

    Args:
        directory: the sessions on disk.
        session_id: the session's id.
        origin: the state that is asked for.
        journals: the log has the session's steps.

    Raises:
        InvalidRequestError: there is no such state; the message lists what is reachable.
        DataLossError: the log cannot be read.
        OSError: the disk failed.
    """
    store = directory.checkpoints(session_id)
    if origin.step is None:
        with store.open(origin.checkpoint) as checkpoint:
            return EarlierState(directory, session_id, checkpoint.name)
    good = sorted((info for info in store.list() if info.damage is None), key=_age, reverse=True)
    records = directory.records(session_id) if journals else []
    for info in good:
        if info.step == origin.step:
            behind = _loads_behind(info, records)
            return EarlierState(directory, session_id, info.name, *((records, origin.step) if behind else ()))
    reached: set[int] = set()
    for info in [*good, CheckpointInfo("")]:
        steps = reached_steps(info, records)
        if origin.step in steps:
            return EarlierState(directory, session_id, info.name, records, origin.step)
        reached.update(steps)
    raise InvalidRequestError.of("step", f"the state after step {origin.step} is kept nowhere; {_told(good, reached)}")


def _age(info: CheckpointInfo) -> tuple[int, int, int, str, str]:
    return info.age


def _step_of(record: LogRecord) -> int | None:
    """Return the step that a record brings a session to; None for a record that leaves the step."""
    if record.header.kind is Kind.COMMIT:
        return decode_entry(StepEntry, record.meta).step
    return decode_entry(LoadEntry, record.meta).step if record.header.kind is Kind.LOAD else None


def _loads_behind(base: CheckpointInfo, records: Iterable[LogRecord]) -> bool:
    """Tell whether the log has loads after a checkpoint and before the next step."""
    for record in records:
        if record.header.kind is Kind.COMMIT and decode_entry(StepEntry, record.meta).step > base.step:
            return False
        if record.header.kind is Kind.LOAD:
            entry = decode_entry(LoadEntry, record.meta)
            if entry.load == base.load + 1:
                return entry.step is None or entry.step == base.step
    return False


def reached_steps(base: CheckpointInfo, records: Iterable[LogRecord]) -> list[int]:
    """Return the steps that the log makes again after a checkpoint, as far as it has no gap."""
    step, load, reached = base.step, base.load, list[int]()
    for record in records:
        if record.header.kind is Kind.COMMIT:
            number = decode_entry(StepEntry, record.meta).step
            if number > step + 1:
                break
            step = max(step, number)
        elif record.header.kind is Kind.LOAD:
            entry = decode_entry(LoadEntry, record.meta)
            if entry.load > load + 1:
                break
            if entry.load == load + 1:
                load, step = entry.load, step if entry.step is None else entry.step
        if step > base.step and reached[-1:] != [step]:
            reached.append(step)
    return reached


def _told(good: Sequence[CheckpointInfo], reached: Iterable[int]) -> str:
    """List the states that can be reached."""
    named = ", ".join(f"{info.name!r} (step {info.step})" for info in good[:_MOST_NAMED])
    runs = [f"{run[0]} to {run[-1]}" for run in _runs(sorted(reached))][-_MOST_NAMED:]
    return f"reachable are the checkpoints {named or '(none)'}" + (f", and the steps {', '.join(runs)}" if runs else "")


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Split ascending numbers where they have gaps."""
    groups = itertools.groupby(enumerate(numbers), lambda each: each[1] - each[0])
    return [[number for _, number in group] for _, group in groups]
