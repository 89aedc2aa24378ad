"""The way of a session's commits onto the disk, and the steps that are durable. Without a log it does nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from stepwire.errors import DataLossError, Reason
from stepwire_server.durability.entries import Attempt, HoldEntry, LoadEntry, StepEntry
from stepwire_server.durability.session_log import EntryLog, SessionLog
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.sessions.ledger import Ledger
from stepwire_server.steps.step import Hold, Step

__all__ = ["Mark", "Progress"]


class Mark(NamedTuple):
    """A moment to wait for.

    Attributes:
        number: the number of the log's record that makes it durable; 0 for none.
        step: the session's step at that moment.
    """

    number: int
    step: int


class Progress:
    """The commits of one session on their way. All but `settle` and `read` are called under the session's lock.

    Attributes:
        last: the moment after the last commit, or the last change of the hold.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], float]) -> None:
        """Start without a log; `clock` returns seconds."""
        self._ledger = ledger
        self._clock = clock
        self._log: SessionLog | None = None
        self._journals = False
        self._telling = threading.Lock()  # of the durable step
        self._every = self._saved_step = 0
        self._wake: Callable[[], object] = lambda: None
        self._save: Callable[[], object] = lambda: None
        self.last = Mark(0, 0)

    def attach(self, log: SessionLog, save: Callable[[], object], *, journals: bool) -> None:
        """Write into a log from now on.

        Args:
            log: the log; it gets all holds.
            save: saves a checkpoint of the present moment, unless there is one.
            journals: the log gets steps and loads too.
        """
        self._log, self._journals, self._save = log, journals, save
        self.last = Mark(0, self._ledger.applied_step)

    @property
    def position(self) -> int:
        """The number of the log's last record: what comes later is of the future; 0 without a log."""
        return 0 if self._log is None else self._log.position

    def needed(self) -> int | None:
        """Return the number of the first record that commits to come may need; None without one."""
        return None if self._log is None else self._log.first_open()

    @property
    def log_bytes(self) -> int:
        """The bytes of the whole log so far; 0 without a log."""
        return 0 if self._log is None else self._log.nbytes

    def begin(self, *, at_once: bool = False) -> EntryLog | None:
        """Begin the entry of a step or a load; None where none is kept.

        Raises:
            DataLossError: DURABILITY_FAILED.
            FencedError: another server owns the data directory.
        """
        if self._log is None:
            return None
        self._log.check()
        return self._log.begin(at_once=at_once) if self._journals else None

    def check(self) -> None:
        """Refuse a commit that could not become durable.

        Raises:
            DataLossError, FencedError: as `begin`.
        """
        if self._log is not None:
            self._log.check()

    def wake_every(self, steps: int, wake: Callable[[], object]) -> None:
        """Call a function with each step that is so many steps behind the last checkpoint, or more."""
        self._every, self._wake = steps, wake

    def step_committed(self, step: Step, attempts: tuple[Attempt, ...] = ()) -> None:
        """Append a step that has been applied; `attempts` tells the chunks of an overlapped one."""
        if self._every and step.request.step >= self._saved_step + self._every:
            self._wake()
        if (entry := step.entry) is None:
            return
        decision = step.decision
        message = StepEntry(
            step=step.request.step,
            opening=step.request.opening,
            generation=step.holder.generation,
            acquired=step.holder.acquired,
            attempts=attempts or ((entry.attempt,) if entry.attempt.chunks else ()),
            inline=entry.inline,
            decision=None if decision is None else (decision.coefficient, decision.groups, decision.skip),
            worker=step.holder.worker,
            parts=tuple(step.parts),
            reduced=step.reduced,
            missing=tuple(sorted(step.request.missing)) if step.reduced else (),
            tables=step.request.tables if step.reduced else (),
            lr_factor=step.request.lr_factor,
        )
        self.last = Mark(entry.commit(message), step.request.step)

    def load_committed(self, entry: EntryLog | None, request: LoadRequest, holder: Hold) -> None:
        """Append a load that has been applied."""
        if entry is None:
            return
        scale = request.loss_scale
        message = LoadEntry(
            load=request.load,
            slots=request.slots,
            dtype=request.dtype.name,
            generation=holder.generation,
            acquired=holder.acquired,
            attempt=entry.attempt,
            step=request.step,
            tensor_steps=request.tensor_steps,
            tensor_scalars=request.tensor_scalars,
            loss_scale=None if scale is None else (scale.scale, scale.clean_steps),
            sum_bound=request.sum_bound,
            worker=holder.worker,
            by_rows=request.by_rows,
            tables=request.tables,
        )
        self.last = Mark(entry.commit(message), self._ledger.applied_step)

    def acquired(self, holder: Hold) -> None:
        """Append that a client has acquired the worker."""
        self._held(HoldEntry(generation=holder.generation, worker=holder.worker))

    def dropped(self, holder: Hold, number: int, result: bytes) -> None:
        """Append that a contribution was dropped: the worker's numbers go on from there on the next server.

        Args:
            holder: the hold of the worker.
            number: the number of the contribution.
            result: the answer, encoded.
        """
        self._held(HoldEntry(generation=holder.acquired, worker=holder.worker, dropped=number, result=result))

    def _held(self, entry: HoldEntry) -> None:
        if self._log is not None:
            self.last = Mark(self._log.hold(entry), self._ledger.applied_step)

    def checkpointed(self, step: int, *, durable: bool = True) -> None:
        """Note that a checkpoint holds a step; it may not be durable yet."""
        self._saved_step = max(self._saved_step, step)
        if durable:
            self._durable(step)

    def _durable(self, step: int) -> None:
        with self._telling:  # not the session's lock, which steps hold for long
            self._ledger.durable_step = max(self._ledger.durable_step, step)

    def settle(self, mark: Mark) -> None:
        """Wait until a moment is durable: only then it may be told.

        Raises:
            DataLossError: DURABILITY_FAILED; the server may lose the moment.
            FencedError: another server owns the data directory.
        """
        if self._log is None:
            return
        self._log.wait(mark.number)
        if self._journals and self._log.keeps(mark.number):
            self._durable(mark.step)

    def settle_step(self, step: Step, mark: Mark) -> None:
        """Settle a step, and note in it the time that it took.

        Raises:
            DataLossError, FencedError: as `settle`.
        """
        if self._log is None:
            return
        began = self._clock()
        self.settle(mark)
        step.sync_seconds = self._clock() - began

    def settle_load(self, mark: Mark) -> None:
        """Wait until a load is durable; where no journal has it, it is saved with a checkpoint.

        Raises:
            DataLossError, FencedError: as `settle`.
        """
        self.settle(mark)
        if self._log is None or self._journals:
            return
        try:
            self._save()
        except OSError as error:
            raise DataLossError(
                f"the load is applied, and no checkpoint of it could be saved: {error}; it may be lost with the server",
                reason=Reason.DURABILITY_FAILED,
            ) from error

    def read(self, mark: Mark) -> None:
        """Wait as `settle` before state is read, which stays possible when the disk has failed.

        Raises:
            FencedError: as `settle`.
        """
        try:
            self.settle(mark)
        except DataLossError:
            return
