"""One session: admit a step, stage it, commit it whole or not at all, and reply to a replay.

The path of one gradient: `begin` checks the holder and the number, and makes a `Step`. Chunks are added to it outside
the lock. `commit` acquires the lock, checks everything again, and only then touches the state, range by range. Each
range's reply is encoded in the same pass that updates it. Once the first range is touched, the commit runs to its end
whatever becomes of the client. A failure from there on is a broken device or a bug. The session says so for ever after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from stepwire.errors import InvalidRequestError, StepwireError
from stepwire_server.aggregation.uploads import UploadSlot
from stepwire_server.devices.pool import Device
from stepwire_server.records.committed import CommitSink
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.session_statistics import SessionStatistics
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.calls_under_way import CallsUnderWay, LastUse
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.closing import closed_on_failure
from stepwire_server.sessions.commits import Commits
from stepwire_server.sessions.contributions import Contributions, Parts
from stepwire_server.sessions.exchange import StateExchange
from stepwire_server.sessions.lane_steps import LaneSteps
from stepwire_server.sessions.ledger import Ledger, session_not_found
from stepwire_server.sessions.memory import SessionMemory
from stepwire_server.sessions.own_steps import OwnSteps
from stepwire_server.sessions.passage import Passage
from stepwire_server.sessions.progress import Progress
from stepwire_server.sessions.session_lock import SessionLock
from stepwire_server.sessions.several import contributions_of
from stepwire_server.sessions.state import SessionState
from stepwire_server.sessions.step_rate import StepRate
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.check_gradient import GradientCheck
from stepwire_server.steps.gradient import StagedChunk
from stepwire_server.steps.reply import ReplyPipeline, ReplyWriter
from stepwire_server.steps.step import Step

__all__ = ["Session"]


class Session:
    """The optimizer state of one model and the result of its last step. Thread-safe.

    Attributes:
        config: the session's config.
        lane_steps: its door for compiled lanes.
        memory: the memory that it shares with its client.
        exchange: its state in and out.
        progress: the way of its commits onto the disk.
        tenant: the tenant that it belongs to; empty for the only one.
        contributions: its door for several workers; None for one worker.
        passage: its ends where it lives on: frozen for a move, or out of memory.
        request_id: the qualified name of the request that created it; empty before it is there.
        calls: the steps in one call and the pulls that are under way.
        created: the clock reading of its creation.
        last_use: the clock reading of its last use.
    """

    def __init__(
        self,
        session_id: str,
        config: SessionConfig,
        device: Device,
        *,
        epoch: int,
        clock: Callable[[], float],
        sinks: Sequence[CommitSink] = (),
    ) -> None:
        """Reserve, then allocate.

        Args:
            session_id: 128 random bits in hexadecimal digits.
            config: the session's config.
            device: the device that it lives on.
            epoch: the incarnation of the server.
            clock: returns seconds.
            sinks: told of each commit, under the lock.

        Raises:
            ResourceExhaustedError: the state does not fit; nothing stays reserved.
        """
        self.config = config
        self.tenant = self.request_id = ""
        self._rate: StepRate | None = None
        self._clock = clock
        workers = 1 if config.aggregation is None else config.aggregation.workers
        self._ledger = Ledger(session_id, epoch=epoch, ready=config.start_at_zero, workers=workers)
        self._lock = SessionLock()
        self.last_use = LastUse(clock)
        self.calls = CallsUnderWay(self.last_use)
        self._state = SessionState(config, device)
        self.progress = Progress(self._ledger, clock)
        self._commits = Commits(self._state, self._ledger, self.progress, clock, sinks)
        self.exchange = StateExchange(self._state, self._ledger, self._lock, self.last_use, self.progress)
        self.memory = SessionMemory(self._state, self._ledger, self._lock)
        parts = Parts(config, self._state, self._ledger, self._lock, self.progress, self._commits, clock)
        with closed_on_failure(self._state):
            self.contributions = contributions_of(parts)
        self.lane_steps = LaneSteps(parts, self.last_use)
        self._own = OwnSteps(parts, self.last_use, self.exchange.step_over)
        self.passage = Passage(parts, self.exchange, self.calls, self.contributions)
        self._steps: OwnSteps | Contributions = self.contributions or self._own
        if self.contributions is not None:
            self.exchange.on_load(self.contributions.loaded)
        self.last_use.note()  # the kernels are compiled now: the lease runs from here
        self.created = self.last_use.at

    @property
    def ledger(self) -> Ledger:
        """The numbers, with all that a compiled lane has stepped."""
        self._lock.settle()
        return self._ledger

    @property
    def session_id(self) -> str:
        """128 random bits in hexadecimal digits."""
        return self._ledger.session_id

    @property
    def needed_record(self) -> int | None:
        """The number of the first record of the log that a commit to come may need; None without one."""
        half = self._state.unfinished
        firsts = [first for first in (self.progress.needed(), None if half is None else half.first_record) if first]
        return min(firsts, default=None)

    @property
    def has_state(self) -> bool:
        """Something has been loaded, or parameters were initialised: there is a state to save."""
        return self.ledger.ready or self.ledger.applied_load > 0

    @property
    def durable(self) -> bool:
        """The session outlives its server, on the disk."""
        return self.config.durability.on_disk

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots that are pulled and loaded."""
        return self.config.visible_slots

    @property
    def memory_bytes(self) -> int:
        """Bytes reserved for the state."""
        return self._state.nbytes

    @property
    def device(self) -> str:
        """The name of the device that the state resides on."""
        return self._state.device.name

    @property
    def engine_seconds(self) -> float:
        """The time that the session has had turns of its engine."""
        return self._state.flow.seconds

    @property
    def depth(self) -> int:
        """The chunks of a reply that it pays to have asked for before the first is waited for."""
        return self._state.arrays.depth

    @property
    def loss_scale(self) -> float | None:
        """The factor that the next gradient must have been multiplied by; None without loss scaling."""
        scale = self._state.loss_scale
        return None if scale is None else scale.scale

    def table_use(self) -> dict[str, dict[str, int]]:
        """Return the rows of each table whose rows are named by ids, by its name: `rows` and `evicted_rows`."""
        tensors, ids = self.config.layout.tensors, self._state.row_ids
        return {tensors[i].spec.name: {"rows": each.rows, "evicted_rows": each.evicted} for i, each in ids.items()}

    @property
    def unfinished_step(self) -> int:
        """The step that a broken stream left half applied; 0 for none."""
        step = self._state.unfinished
        return 0 if step is None else step.number

    def give_to(self, tenant: str, rate: StepRate | None = None) -> None:
        """Belong to a tenant from now on, whose steps take from a bucket; None for no bound."""
        self.tenant, self._rate = tenant, rate
        self.lane_steps.possible &= rate is None  # each step is counted
        self._state.flow.give_to(tenant)

    def idle_seconds(self, now: float) -> float | None:
        """Return the time since the last use, in seconds; None while a stream is attached or a call is under way."""
        return None if self.passage.in_use else max(now - self.last_use.at, 0.0)

    def expired(self, now: float) -> bool:
        """Tell whether the session has been idle for longer than its lease."""
        return (self.idle_seconds(now) or 0.0) > self.config.lease_seconds

    def statistics(self) -> SessionStatistics:
        """Return the session's numbers at this moment."""
        ledger = self.ledger
        numbers = (ledger.applied_step, ledger.applied_load, self.unfinished_step)
        return SessionStatistics(*numbers, self.memory_bytes, ledger.attached, len(self.exchange.loads))

    @contextlib.contextmanager
    def untold(self) -> Iterator[None]:
        """Tell no sink of the commits in a block: they are made again, and were told before."""
        with self._commits.untold():
            yield

    # --- holds -------------------------------------------------------------------------------------------

    def acquire(self) -> Holder:
        """Give the worker to a new client, and fence the one before."""
        with self._lock:
            return self.ledger.worker.acquire()

    def holder_of(self, token: int, worker: int = 0) -> Holder:
        """Return the present hold of a worker to a call that brings its token.

        Raises:
            InvalidRequestError: the session has no such worker.
            FencedError, UnavailableError: as `Worker.holder_of`.
            SessionNotFoundError: the session has ended.
        """
        with self._lock:
            self.ledger.check_open()
            return self.ledger.members[worker].worker.holder_of(token)

    @contextlib.contextmanager
    def attached(
        self,
        stream: ClientStream,
        token: int,
        epoch: int,
        durable_step: int = 0,
        worker: int | None = 0,
        acquisition: int = 0,
    ) -> Iterator[Holder]:
        """Keep a stream attached for a block; yields its hold of the worker.

        Args:
            stream: the stream.
            token: of the client's last attach, to go on; 0 acquires the worker from its holder.
            epoch: the epoch the client knows; 0 skips the check.
            durable_step: the last step that the client knows to be durable.
            worker: the index of the worker; None for whichever no stream is attached as.
            acquisition: without a token, the client's number of its attempts; 0 for none.

        Raises:
            InvalidRequestError: the session has no such worker, or a token comes without one.
            ResourceExhaustedError: a stream is attached as every worker.
            FencedError: the token or the epoch is not the newest.
            UnavailableError: the worker would be a new one, and the session is frozen.
            SessionNotFoundError: the session has ended.
            DataLossError: the server knows of fewer durable steps than the client.
        """
        if token and worker is None:
            raise InvalidRequestError.of("open.attach_token", "a token is one worker's; leave it out beside any_worker")
        with self._lock:
            self.ledger.check_epoch(epoch)
            self.ledger.check_open()
            self.ledger.check_durable(durable_step)
            members, freeze = self.ledger.members, self.ledger.freeze
            if freeze is not None:
                freeze.check_attach()
            members.note_attempt(now := self._clock())
            member = members[members.vacant(acquisition, now) if worker is None else worker]
            if freeze is not None and not member.worker.holder.acquired:
                freeze.check_worker(member.worker.index)
            held, was_present = member.worker, member.is_present(now)
            holder = held.renew(token, stream) if token else held.acquire(stream, acquisition)
            members.join(member, now, was_present=was_present)
            if holder.acquired == holder.generation:
                self.progress.acquired(holder)
            self._wake()
            mark = self.progress.last
        try:
            self.progress.settle(mark)  # the reply tells of the hold
            yield holder
        finally:
            with self._lock:
                held.detach(stream)
                self._wake()
                self.last_use.note()

    def settle(self) -> None:
        """Wait until all that a description made before tells of is durable: an owner that was overtaken tells nothing.

        A session whose disk has failed is described all the same.

        Raises:
            FencedError: another server owns the data directory.
        """
        with self._lock:  # a commit under way has changed some numbers, and not this one
            mark = self.progress.last
        self.progress.read(mark)

    def end_waits(self, error: StepwireError) -> None:
        """Have no worker wait for others from now on: each gets an error."""
        if self.contributions is not None:
            self.contributions.end(error)

    def let_go(self) -> None:
        """End the waits for clients that have left, which hold a thread."""
        if self.contributions is not None:
            self.contributions.let_go()

    def _wake(self) -> None:
        """Have workers that wait for others look again: one came, or went."""
        if self.contributions is not None:
            self.contributions.wake()

    # --- steps -------------------------------------------------------------------------------------------

    def begin(self, request: StepRequest, holder: Holder, began: float, slot: UploadSlot | None = None) -> Step:
        """Admit a step and make room for its gradient, or for the reply where that is larger.

        Args:
            request: the step as it is asked for.
            holder: the hold of the worker that it comes under.
            began: the clock reading of its first message.
            slot: its place among the uploads of several workers, given back with the gradient; None for none.

        Raises:
            FencedError: the holder or the epoch is not the newest.
            UnavailableError: a newer stream of the same client holds the worker.
            SessionNotFoundError: the session has ended.
            SessionNotReadyError: parameters have not been loaded, or another step is half applied.
            StateChangedError: the last load is not the one that the client knows.
            StepMismatchError: neither the next step nor a replay.
            DataLossError: the state is damaged.
            ResourceExhaustedError: no room just now, or the tenant's steps come faster than they may.
        """
        if self._rate is not None:
            self._rate.admit(began)
        return self._steps.begin(request, holder, began, slot)

    def commit(self, step: Step, writer: ReplyWriter) -> StepResult:
        """Apply a staged step, or replay the last one; the parameters go to `writer`.

        Raises:
            InvalidRequestError: the chunks do not cover the space; the state is as before.
            NonFiniteGradientError: under the policy `reject`; the state is as before.
            StepwireError: as `begin`; the state is as before.
            DataLossError: DURABILITY_FAILED; the step is applied, and may be lost with the server.
            NotEnoughWorkersError: the round had too few contributions for too long; the state is as before.
        """
        return self._steps.commit(step, writer)

    def check(self, step: Step) -> GradientCheck | None:
        """Return the facts that a coordinator decides by, before the commit; None where the step is a replay.

        Raises:
            StepwireError: as `commit`; the state is as before.
        """
        return self._steps.check(step)

    def apply(self, step: Step, chunk: StagedChunk, reply: ReplyPipeline) -> None:
        """Apply a chunk of an overlapped step, unless it has been applied, and reply with it.

        Raises:
            StepwireError: as `begin`, or it is no longer this step's turn.
        """
        self._own.apply(step, chunk, reply)

    def finish(self, step: Step) -> StepResult:
        """Commit an overlapped step, all of which has been applied.

        Raises:
            InvalidRequestError: chunks are missing; the step stays as far as it is.
            StepwireError: as `apply`.
        """
        return self._own.finish(step)

    def lead(self, epoch: int) -> None:
        """Serve from now on what followed another server: its holders attach again, in a newer epoch."""
        with self._lock:
            self.ledger.lead(epoch)
            self.last_use.note()

    # --- end of life -------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the session after the commit under way and free its memory. Closing twice is harmless."""
        with self._lock:
            if not self.ledger.closed:
                self.ledger.closed = True
                self.ledger.members.end(session_not_found(self.session_id))
                self.passage.release()
