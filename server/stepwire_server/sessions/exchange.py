"""State in and out of a session: pulls as of one moment, loads all at once, captures for checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from stepwire.errors import StateChangedError
from stepwire_server.durability.manifest import MemberFacts, Shadow
from stepwire_server.engines.protocol import PARAM, HostArray, Table
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.calls_under_way import CallsUnderWay, LastUse
from stepwire_server.sessions.capture import Block, Capture
from stepwire_server.sessions.incoming_state import IncomingState
from stepwire_server.sessions.ledger import Ledger
from stepwire_server.sessions.load import Load
from stepwire_server.sessions.progress import Progress
from stepwire_server.sessions.row_load import RowLoad
from stepwire_server.sessions.row_numbers import row_blocks
from stepwire_server.sessions.session_lock import SessionLock
from stepwire_server.sessions.shadow import ProbedValues, read_probe, shadow_of
from stepwire_server.sessions.staged_loads import check_loaded_rows, replace_rows, staged_load
from stepwire_server.sessions.state import SessionState
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.overlap import unfinished
from stepwire_server.steps.step import Hold

__all__ = ["Captured", "StateExchange"]


class Captured(NamedTuple):
    """One moment of a session, for a checkpoint.

    Attributes:
        numbers: the numbers of the state.
        sum_bound: no element of the accumulated gradient is larger in magnitude.
        ready: parameters have been loaded or were initialised.
        last_result: the result of the last step, for a replay; None for none.
        holder: the hold of worker 0.
        acquisitions: the number that tells the workers of this moment; see `Members.acquisitions`.
        members: the facts of several workers; empty for one.
        position: the number of the log's last record at that moment.
        blocks: the blocks of all slots, in any order.
        probed: the values that a shadow step begins with; None for none.
        end: ends the capture: steps copy nothing for it any more.
        present: of several workers, those that follow a move.
        clocks: of several workers, their clocks, by index; empty but for a move.
    """

    numbers: Snapshot
    sum_bound: float
    ready: bool
    last_result: StepResult | None
    holder: Hold
    acquisitions: int
    members: tuple[MemberFacts, ...] = ()
    position: int = 0
    blocks: Iterator[Block] = iter(())
    probed: ProbedValues | None = None
    end: Callable[[], object] = lambda: None
    present: frozenset[int] = frozenset()
    clocks: Mapping[int, int] = {}


_RETRY_SECONDS: Final = 0.1
_PATIENCE_SECONDS: Final = 5.0
"""The longest time that a checkpoint waits for the end of a half-applied step."""


class StateExchange:
    """The door of a session for state in and out. Thread-safe: it shares the session's lock.

    Attributes:
        loads: the loads that are under way.
    """

    def __init__(
        self, state: SessionState, ledger: Ledger, lock: SessionLock, last_use: LastUse, progress: Progress
    ) -> None:
        """Open the door of a session."""
        self._state = state
        self._ledger = ledger
        self._lock = lock
        self._last_use = last_use
        self._progress = progress
        self._awaiting: tuple[queue.SimpleQueue[Captured], Callable[[], object]] | None = None
        self._loaded: Callable[[], object] = lambda: None
        self.loads = CallsUnderWay(last_use)

    def on_load(self, loaded: Callable[[], object]) -> None:
        """Have a function called with each load that is committed, under the session's lock."""
        self._loaded = loaded

    def snapshot(self) -> Snapshot:
        """Return the present moment: `read` compares it, so that a pull is of one moment, and of a durable one.

        Raises:
            SessionNotReadyError, SessionNotFoundError, DataLossError: there is nothing to read.
            StateChangedError: a step is half applied.
        """
        with self._lock:
            self._check_readable()
            snapshot = self._state.snapshot(self._ledger.applied_step, self._ledger.applied_load)
            mark = self._progress.last
        self._progress.read(mark)
        return snapshot

    def read(self, snapshot: Snapshot, slot: str, start: int, out: HostArray) -> None:
        """Encode a range of a slot as of `snapshot` into `out`, `(n,)` of a wire dtype.

        Raises:
            StateChangedError: a step or a load was committed since.
        """
        with self._lock:
            self._check_unmoved(snapshot)
            self._state.read(slot, start, out)

    def read_rows(self, snapshot: Snapshot, slot: str, table: Table, rows: HostArray, out: HostArray) -> None:
        """Encode rows of a table as of `snapshot` into `out`, `(n · width,)` of a wire dtype.

        Raises:
            StateChangedError: a step or a load was committed since.
        """
        with self._lock:
            self._check_unmoved(snapshot)
            self._state.arrays.read_rows(slot, table, rows, out).wait()

    @contextlib.contextmanager
    def row_ids(self, snapshot: Snapshot, tensor: int) -> Iterator[HostArray]:
        """Hold the ids of a table's rows as of `snapshot` for a block, `(n,) int64`, rising.

        Raises:
            StateChangedError: a step or a load was committed since.
            ResourceExhaustedError: no room just now.
        """
        with self._lock:
            self._check_unmoved(snapshot)
            ids = self._state.row_ids[tensor]
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.room(2 * 8 * ids.rows))
                found, release = ids.held(), stack.pop_all()
        with release:
            found.sort()
            yield found

    def _check_unmoved(self, snapshot: Snapshot) -> None:
        self._check_readable()
        now = (self._ledger.applied_step, self._ledger.applied_load)
        if now != (snapshot.step, snapshot.load):
            raise StateChangedError(
                f"the session moved from step {snapshot.step}, load {snapshot.load} to step {now[0]}, load "
                f"{now[1]} during the pull; pull again",
                metadata={"step": snapshot.step, "applied_step": now[0]},
            )

    def read_parameters(self, targets: Iterable[tuple[int, Callable[[int], HostArray]]]) -> Snapshot:
        """Encode the parameters of one moment; return that moment, which is durable.

        Args:
            targets: for each range its start, and a function of the start that returns its place, `(n,)` of a wire
                dtype.

        Raises:
            StepwireError: as `snapshot`.
        """
        with self._lock:
            self._check_readable()
            snapshot = self._state.snapshot(self._ledger.applied_step, self._ledger.applied_load)
            for start, target in targets:
                self._state.read(PARAM, start, target(start))
            mark = self._progress.last
        self._progress.read(mark)
        return snapshot

    def read_rows_at_once(self, targets: Iterable[tuple[Table, HostArray, HostArray]]) -> Snapshot:
        """Encode the parameters of rows of one moment; return that moment, which is durable.

        Args:
            targets: a table, some of its rows, and their place, `(n · width,)` of a wire dtype.

        Raises:
            StepwireError: as `snapshot`.
        """
        with self._lock:
            self._check_readable()
            snapshot = self._state.snapshot(self._ledger.applied_step, self._ledger.applied_load)
            for table, rows, out in targets:
                self._state.arrays.read_rows(PARAM, table, rows, out).wait()
            mark = self._progress.last
        self._progress.read(mark)
        return snapshot

    @contextlib.contextmanager
    def room(self, nbytes: int) -> Iterator[None]:
        """Reserve memory for a block: of what is read at once.

        Raises:
            ResourceExhaustedError: no room just now.
        """
        budget = self._state.device.budget
        reservation = budget.reserve(nbytes, "the rows of a pull", retry_after_seconds=_RETRY_SECONDS)
        try:
            yield
        finally:
            reservation.release()

    def _check_readable(self) -> None:
        self._ledger.check_usable()
        self._last_use.note()
        if (half := self._state.unfinished) is not None:
            raise StateChangedError(
                f"step {half.number} is half applied; pull when it is finished",
                metadata={"unfinished_step": half.number},
            )

    def follows(self, request: LoadRequest, holder: Holder) -> bool:
        """Return True for the next load, and False for a replay of the last one, which is durable then.

        Raises:
            StepwireError: as `Ledger.admit_load`.
        """
        with self._lock:
            following = self._ledger.admit_load(request, holder)
            mark = self._progress.last
        if not following:
            self._progress.settle_load(mark)
        return following

    @contextlib.contextmanager
    def loading(self, request: LoadRequest, holder: Holder) -> Iterator[Load | RowLoad | None]:
        """Admit a load and stage it for a block; yields None for a replay of the last.

        While it is on its way, the session's lease does not run.

        Raises:
            StepwireError: as `Ledger.admit_load`.
            SessionNotReadyError: rows come before the whole parameters.
            ResourceExhaustedError: it does not fit beside the state.
        """
        with self.loads.one():
            if not self.follows(request, holder):
                yield None
                return
            if request.by_rows:
                with self._lock:
                    self._ledger.check_usable()
            with staged_load(self._state, request, holder, self._progress) as load:
                yield load

    @contextlib.contextmanager
    def captured(self, begun: Callable[[], object] = lambda: None) -> Iterator[Captured]:
        """Keep the present moment for a block, so that it can be read while steps go on.

        Args:
            begun: called at that moment, under the session's lock.

        Raises:
            SessionNotFoundError, DataLossError: there is no sound state.
            StateChangedError: a step is half applied, or another reader is at work.
        """
        captured = self._begun(begun)
        try:
            yield captured
        finally:
            captured.end()
            with self._lock:
                self._state.capture = None

    def _begun(self, begun: Callable[[], object]) -> Captured:
        """Begin a capture: now, or at the end of the step that is half applied."""
        with self._lock:
            self._ledger.check_sound()
            if self._state.capture is not None or self._awaiting is not None:
                raise StateChangedError("a checkpoint is being taken; try again later")
            if self._state.unfinished is None:
                return self._begin(begun)
            awaiting = queue.SimpleQueue[Captured]()
            self._awaiting = awaiting, begun
        try:
            return awaiting.get(timeout=_PATIENCE_SECONDS)
        except queue.Empty:
            with self._lock:
                self._awaiting = None
                if not awaiting.empty():
                    return awaiting.get()
            raise StateChangedError("a step is half applied; try again when it is finished") from None

    def step_over(self) -> None:
        """Begin the capture that waits for the end of a half-applied step, if one does. Under the session's lock."""
        if self._awaiting is not None:
            awaiting, begun = self._awaiting
            awaiting.put(self._begin(begun))
            self._awaiting = None

    def _begin(self, begun: Callable[[], object]) -> Captured:
        begun()
        state, ledger = self._state, self._ledger
        state.capture = capture = Capture(state.config.visible_slots, state.config.layout.size, state.read)
        return Captured(
            state.snapshot(ledger.applied_step, ledger.applied_load),
            state.sum_bound,
            ledger.ready,
            ledger.last_result,
            ledger.worker.holder,
            ledger.members.acquisitions,
            ledger.members.facts(ledger.applied_load),
            self._position(),
            itertools.chain(capture.blocks(self._lock), row_blocks(state.row_numbers, state.row_ids)),
            read_probe(state.config, state.read),
            capture.end,
        )

    def _position(self) -> int:
        """Return the number of the last record that a checkpoint of this moment makes superfluous."""
        position, needed = self._progress.position, self._progress.needed()
        return position if needed is None else min(position, needed - 1)

    def restore(self, captured: Captured, read: Callable[[str, int, HostArray], None]) -> None:
        """Take over a moment of an earlier server; `read` reads a range of a slot into an array, `(n,) float32`.

        Raises:
            DataLossError: the checkpoint is damaged.
            ResourceExhaustedError: as `incoming`.
        """
        with self.incoming() as incoming:
            incoming.read(read)
            self.restored(incoming, captured)

    def incoming(self) -> IncomingState:
        """Begin to bring in the arrays of another moment; a context manager.

        Raises:
            ResourceExhaustedError: as `SessionState.stage_load`.
        """
        return IncomingState(self._state)

    def restored(self, incoming: IncomingState, captured: Captured) -> None:
        """Complete a moment whose arrays are there, with its numbers."""
        numbers = captured.numbers
        with self._lock:
            incoming.finish(numbers, captured.sum_bound)
            self._ledger.restore(numbers.step, numbers.load, ready=captured.ready, last_result=captured.last_result)
            if captured.members:
                self._ledger.members.restore(captured.members, numbers.load, self._ledger.epoch)
            else:
                self._ledger.worker.restore(captured.holder.acquired, self._ledger.epoch)

    def shadow(self, numbers: Snapshot | None = None, probed: ProbedValues | None = None) -> Shadow | None:
        """Make the shadow step of a state like this one; without numbers, of the present moment.

        The lock is held for a few reads alone.
        """
        state = self._state
        if numbers is None:
            with self._lock:
                numbers = state.snapshot(self._ledger.applied_step, self._ledger.applied_load)
                probed = read_probe(state.config, state.read)
        return shadow_of(state.config, state.device, numbers, probed)

    def commit_load(self, load: Load | RowLoad) -> bool:
        """Put staged slots in the place of the present ones; False if it had been committed before.

        Raises:
            StepwireError: as `loading`; the state is as before.
            ResourceExhaustedError: a table has no room for new ids; the state is as before.
            DataLossError: DURABILITY_FAILED; the load may be lost with the server.
        """
        with self._lock:
            load.request = request = load.request.placed(self._ledger.applied_step)
            following = self._ledger.admit_load(request, load.holder)
            if following:
                self._commit_load(load)
            mark = self._progress.last
        self._progress.settle_load(mark)
        return following

    def _commit_load(self, load: Load | RowLoad) -> None:
        request, state = load.request, self._state
        half = state.unfinished
        if half is not None and (request.step is None or set(request.slots) != set(state.config.visible_slots)):
            raise unfinished(half.number, "finish it")
        if isinstance(load, RowLoad):
            check_loaded_rows(state, load.tables)
        with self._ledger.changing("load", request.load):
            if isinstance(load, RowLoad):
                replace_rows(state, load.tables)
            else:
                state.adopt(load.staged, request, first=not self._ledger.ready)
            self._ledger.commit_load(request, load.holder)
        self._loaded()
        self._progress.load_committed(load.entry, request, load.holder)
        if state.unfinished is None:
            self.step_over()
