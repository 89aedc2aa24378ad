"""One session: admit a step, stage it, commit it whole or not at all, and answer a replay.

The path of one gradient: `begin` checks who asks and which step it is, and hands out a `GradientStaging` that
chunks are added to outside the lock. `commit` takes the lock, checks everything again, and only then touches
the state, range by range, each range's answer being encoded in the same pass that updates it. Once the first
range is touched the commit runs to its end whatever becomes of the client; what fails there is a broken
device or a bug, and the session says so for ever after instead of going on half-updated.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from stepwire.errors import (
    DataLossError,
    FencedError,
    NonFiniteGradientError,
    Reason,
    SessionNotFoundError,
    SessionNotReadyError,
    StateChangedError,
    StepMismatchError,
)
from stepwire.optimizers import Hyperparameters

from stepwire_server import rules
from stepwire_server.engines.protocol import PARAM, Engine, EngineState, HostArray
from stepwire_server.memory import MemoryBudget, Reservation
from stepwire_server.plan import NonFinitePolicy, SessionPlan, StepOrder
from stepwire_server.progress import GroupRecord, Snapshot, SteppedRun, StepRecord, runs_of
from stepwire_server.slot import Attachment, WorkerSlot
from stepwire_server.staging import GradientStaging, StagedChunk

__all__ = ["ReplySink", "Session"]


class ReplySink(Protocol):
    """Where a commit puts the answer's chunks, in flat order. Must not block and must not fail."""

    def buffer(self, offset: int, count: int) -> HostArray:
        """Return an uninitialised array of the reply dtype for the next chunk; every element is written."""
        ...

    def flush(self) -> None:
        """The last buffer is complete."""
        ...


class Session:
    """The optimizer state of one model and the record of its last step. Thread-safe."""

    def __init__(
        self,
        session_id: str,
        plan: SessionPlan,
        engine: Engine,
        budget: MemoryBudget,
        *,
        epoch: int,
        clock: Callable[[], float],
    ) -> None:
        """Reserve, then allocate.

        Raises:
            ResourceExhaustedError: the state does not fit; nothing stays reserved.
        """
        self.session_id = session_id
        self.plan = plan
        self.epoch = epoch
        self.slots = (PARAM, *rules.slots_for(plan.optimizer))
        self.slot = WorkerSlot(0)
        self.applied_step = 0
        self.applied_load = 0
        self.durable_step = 0
        self.ready = plan.start_at_zero
        self.created = self.last_used = clock()
        self._clock = clock
        self._engine = engine
        self._budget = budget
        self._lock = threading.Lock()
        self._last_record: StepRecord | None = None
        self._tensor_steps = [0] * len(plan.layout.tensors)
        self._runs = runs_of(plan.layout, self._tensor_steps)
        self._closed = False
        self._damage: str | None = None
        self._memory = budget.reserve(4 * plan.layout.size * len(self.slots), "the session's state")
        try:
            self._state = engine.allocate(self.slots, plan.layout.size)
            self._prepare(plan.groups, plan.gradient_dtype, plan.reply_dtype)
        except BaseException:
            self._memory.release()
            raise

    @property
    def memory_bytes(self) -> int:
        """Bytes reserved for the state."""
        return self._memory.nbytes

    @property
    def device(self) -> str:
        """Where the state lives."""
        return self._engine.device.name

    @property
    def closed(self) -> bool:
        """The session has ended."""
        return self._closed

    def expired(self, now: float) -> bool:
        """Tell whether the lease has run out: no stream, and no call for its length."""
        return not self.slot.attached and now - self.last_used > self.plan.lease_seconds

    # --- slots -------------------------------------------------------------------------------------------

    def take_slot(self) -> int:
        """Give slot 0 to a new holder; returns its token."""
        with self._lock:
            return self.slot.take()

    @contextlib.contextmanager
    def attached(self, attachment: Attachment, token: int, epoch: int) -> Iterator[int]:
        """Keep a stream attached for a block; yields its token.

        Raises:
            FencedError: the token or the epoch is not the newest.
            SessionNotFoundError: the session has ended.
        """
        with self._lock:
            self._check_epoch(epoch)
            self._check_open()
            held = self.slot.attach(attachment, token)
        try:
            yield held
        finally:
            with self._lock:
                self.slot.detach(attachment)
                self.last_used = self._clock()

    # --- steps -------------------------------------------------------------------------------------------

    def begin(self, order: StepOrder, token: int) -> GradientStaging | None:
        """Admit a step and make room for its gradient; None for a replay, which needs none.

        Raises:
            FencedError: the token or the epoch is not the newest.
            SessionNotFoundError: the session has ended.
            SessionNotReadyError: parameters have not been loaded.
            StepMismatchError: neither the next step nor a replay.
            DataLossError: the state is damaged.
            ResourceExhaustedError: no room for the gradient just now.
        """
        with self._lock:
            if not self._admit(order, token):
                return None
            state = self._state
        self._prepare(order.groups, order.gradient_dtype, order.reply_dtype)
        room = self._budget.reserve(
            self.plan.layout.size * order.gradient_dtype.itemsize,
            "the step's gradient",
            retry_after_seconds=1.0,
        )
        return GradientStaging(order, self.plan.layout, state, room)

    def commit(
        self, order: StepOrder, staging: GradientStaging | None, token: int, sink: ReplySink, began: float
    ) -> StepRecord:
        """Apply a staged step, or replay the last one; the parameters go to `sink`.

        Args:
            order: what `begin` admitted.
            staging: what `begin` returned.
            token: as for `begin`.
            sink: takes the answer.
            began: clock reading of the step's first frame.

        Raises:
            InvalidRequestError: the chunks do not cover the space; the state is as before.
            NonFiniteGradientError: under the policy `reject`; the state is as before.
            StepwireError: as `begin`; the state is as before.
        """
        committed = self._clock()
        with self._lock:
            if not self._admit(order, token):
                return self._replay(order, sink)
            if staging is None:  # admitted as a replay, and the step it replays has been undone by nobody
                raise StateChangedError(f"step {order.step} was a replay when it began and is not now; send it again")
            staging.complete()
            self._check_finite(staging)
            record = self._record(order, staging, committed - began, self._clock() - committed)
            return self._apply(order, staging, sink, record)

    def _admit(self, order: StepOrder, token: int) -> bool:
        """Return True for the next step and False for a replay; see `begin` for what is raised."""
        self._check_epoch(order.epoch)
        self._check_usable()
        self.slot.check(token)
        self.last_used = self._clock()
        if order.step == self.applied_step + 1:
            return True
        if order.step == self.applied_step and self._last_record is not None:
            return False
        raise _step_mismatch("step", expected=self.applied_step + 1, actual=order.step)

    def _check_finite(self, staging: GradientStaging) -> None:
        if not staging.non_finite_count or self.plan.non_finite is not NonFinitePolicy.REJECT:
            return
        layout = self.plan.layout
        tensor = next(layout.overlapping(staging.first_non_finite, staging.first_non_finite + 1))
        raise NonFiniteGradientError(
            f"step {staging.order.step}: the gradient of tensor {tensor.spec.name!r} holds NaN or Inf "
            f"({staging.non_finite_count} elements in all); nothing was applied. Mend the gradient, or create the "
            "session with the policy 'skip' or 'allow'",
            metadata={
                "tensor": tensor.spec.name,
                "element": staging.first_non_finite - tensor.offset,
                "non_finite_count": staging.non_finite_count,
            },
        )

    def _record(self, order: StepOrder, staging: GradientStaging, receive: float, queue: float) -> StepRecord:
        skipped = bool(staging.non_finite_count) and self.plan.non_finite is NonFinitePolicy.SKIP
        grown = 0 if skipped else 1
        steps = [0] * len(order.groups)
        for run in self._runs:
            steps[run.group] = max(steps[run.group], run.t + grown)
        return StepRecord(
            step=order.step,
            epoch=self.epoch,
            skipped=skipped,
            grad_norm=math.sqrt(math.fsum(staging.squared_norms)),
            non_finite_count=staging.non_finite_count,
            groups=tuple(
                GroupRecord(math.sqrt(squared), hyper, t)
                for squared, hyper, t in zip(staging.squared_norms, order.groups, steps, strict=True)
            ),
            receive_seconds=receive,
            queue_seconds=queue,
        )

    def _apply(self, order: StepOrder, staging: GradientStaging, sink: ReplySink, record: StepRecord) -> StepRecord:
        started = self._clock()
        if record.skipped:
            self._send_parameters(order, sink)
        else:
            with self._all_or_damaged(f"step {order.step}"):
                self._update(order, staging, sink)
        record = record.applied(self._clock() - started)
        self._last_record = record
        self.applied_step = order.step
        return record

    def _update(self, order: StepOrder, staging: GradientStaging, sink: ReplySink) -> None:
        stepped = [run.stepped(self.plan.optimizer, order.groups[run.group]) for run in self._runs]
        for chunk in staging.drain():
            for start, end in _pieces(chunk.offset, chunk.end, order.reply_elements if order.reply else None):
                out = sink.buffer(start, end - start) if order.reply else None
                self._update_piece(stepped, chunk, start, end, out)
                if order.reply:
                    sink.flush()
        self._tensor_steps = [t + 1 for t in self._tensor_steps]
        self._runs = [run.next() for run in self._runs]

    def _update_piece(
        self, runs: list[SteppedRun], chunk: StagedChunk, start: int, end: int, out: HostArray | None
    ) -> None:
        """Update flat elements `[start, end)`; padding is answered with zeros."""
        done = start
        for run, rule, scalars in runs:
            low, high = max(run.start, start), min(run.end, end)
            if low >= high:
                continue
            if out is not None:
                out[done - start : low - start] = 0
            target = None if out is None else out[low - start : high - start]
            self._state.update(rule, scalars, low, chunk.gradient, low - chunk.offset, high - chunk.offset, target)
            done = high
        if out is not None:
            out[done - start :] = 0

    def _replay(self, order: StepOrder, sink: ReplySink) -> StepRecord:
        assert self._last_record is not None
        self._send_parameters(order, sink)
        return self._last_record.replay()

    def _send_parameters(self, order: StepOrder, sink: ReplySink) -> None:
        if order.reply:
            for start, end in _pieces(0, self.plan.layout.size, order.reply_elements):
                self._state.read(PARAM, start, sink.buffer(start, end - start))
                sink.flush()

    # --- state in and out --------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the present moment: `read` compares it, so that a pull is of one moment.

        Raises:
            SessionNotReadyError, SessionNotFoundError, DataLossError: there is nothing to read.
        """
        with self._lock:
            self._check_usable()
            self.last_used = self._clock()
            return Snapshot(self.applied_step, self.applied_load, tuple(self._tensor_steps))

    def read(self, snapshot: Snapshot, slot: str, start: int, out: HostArray) -> None:
        """Encode a range of a slot as of `snapshot`.

        Raises:
            StateChangedError: a step or a load was committed since.
        """
        with self._lock:
            self._check_usable()
            self.last_used = self._clock()
            if (snapshot.step, snapshot.load) != (self.applied_step, self.applied_load):
                raise StateChangedError(
                    f"the session moved from step {snapshot.step}, load {snapshot.load} to step {self.applied_step}, "
                    f"load {self.applied_load} during the pull; pull again",
                    metadata={"step": snapshot.step, "applied_step": self.applied_step},
                )
            self._state.read(slot, start, out)

    def admit_load(self, token: int, load: int, step: int | None) -> bool:
        """Return True for the next load and False for a replay of the last.

        Raises:
            StepMismatchError: neither, or `step` would go back.
            FencedError, SessionNotFoundError, DataLossError: as `begin`.
        """
        with self._lock:
            return self._admit_load(token, load, step)

    def stage_load(self, slots: tuple[str, ...]) -> tuple[EngineState, Reservation]:
        """Allocate room for a load beside the state, so that a broken one changes nothing.

        Raises:
            ResourceExhaustedError: it does not fit.
        """
        room = self._budget.reserve(4 * self.plan.layout.size * len(slots), "staging the load")
        try:
            return self._engine.allocate(slots, self.plan.layout.size), room
        except BaseException:
            room.release()
            raise

    def commit_load(
        self,
        staged: EngineState,
        slots: tuple[str, ...],
        token: int,
        load: int,
        step: int | None,
        tensor_steps: list[int],
    ) -> bool:
        """Put staged slots in the place of the present ones; False if it had been committed before.

        Raises:
            StepwireError: as `admit_load`; the state is as before.
        """
        with self._lock:
            if not self._admit_load(token, load, step):
                return False
            with self._all_or_damaged(f"load {load}"):
                self._state.adopt(staged)
            self.applied_load = load
            if step is not None and step != self.applied_step:
                self.applied_step, self._last_record = step, None
            if tensor_steps:
                self._tensor_steps = list(tensor_steps)
                self._runs = runs_of(self.plan.layout, self._tensor_steps)
            self.ready = self.ready or PARAM in slots
            return True

    def _admit_load(self, token: int, load: int, step: int | None) -> bool:
        self._check_open()
        self._check_undamaged()
        self.slot.check(token)
        self.last_used = self._clock()
        if load == self.applied_load and load > 0:
            return False
        if load != self.applied_load + 1:
            raise _step_mismatch("load", expected=self.applied_load + 1, actual=load)
        if step is not None and step < self.applied_step:
            raise StepMismatchError(
                f"open.step is {step} and the session is at step {self.applied_step}; step numbers never go back: "
                "load without a step, or into a new session",
                reason=Reason.STEP_SUPERSEDED,
                metadata={"field": "open.step", "expected_step": self.applied_step, "actual_step": step},
            )
        return True

    # --- end of life -------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the session after the commit under way and free its memory. Closing twice is harmless."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.slot.orphan()
                self._state.close()
                self._memory.release()

    # --- checks ------------------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        self._check_open()
        self._check_undamaged()
        if not self.ready:
            raise SessionNotReadyError(
                f"session {self.session_id} has no parameters yet; load the slot {PARAM!r} first",
                metadata={"session_id": self.session_id},
            )

    def _check_open(self) -> None:
        if self._closed:
            raise session_not_found(self.session_id)

    def _check_undamaged(self) -> None:
        if self._damage is not None:
            raise DataLossError(
                f"session {self.session_id} was damaged when {self._damage} failed half-way; load its last good "
                "state into a new session",
                metadata={"session_id": self.session_id},
            )

    def _check_epoch(self, epoch: int) -> None:
        if epoch not in (0, self.epoch):
            raise FencedError(
                f"session {self.session_id} is in epoch {self.epoch}, the request is of epoch {epoch}; attach again",
                reason=Reason.STALE_EPOCH,
                metadata={"epoch": self.epoch, "actual_epoch": epoch},
            )

    @contextlib.contextmanager
    def _all_or_damaged(self, what: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._damage = what
            raise

    def _prepare(self, groups: tuple[Hyperparameters, ...], gradient: np.dtype[Any], reply: np.dtype[Any]) -> None:
        for hyper in groups:
            self._engine.prepare(rules.rule_for(self.plan.optimizer, hyper), gradient, reply)


def session_not_found(session_id: str) -> SessionNotFoundError:
    """Say that a session does not exist, with the id as it was sent."""
    return SessionNotFoundError(
        f"session {session_id[:64]!r} does not exist here: it was never created, was closed, its lease ran out, or "
        "its server was restarted; create a new one and load your last saved state",
        metadata={"session_id": session_id[:64]},
    )


def _step_mismatch(what: str, *, expected: int, actual: int) -> StepMismatchError:
    old = actual < expected
    return StepMismatchError(
        f"{what} {actual} {'was applied long ago' if old else 'is too far ahead'}; the next {what} is {expected}",
        reason=Reason.STEP_SUPERSEDED if old else Reason.STEP_MISMATCH,
        metadata={f"expected_{what}": expected, f"actual_{what}": actual},
    )


def _pieces(start: int, end: int, most: int | None) -> Iterator[tuple[int, int]]:
    """Cut `[start, end)` into pieces of at most `most` elements."""
    size = most or max(end - start, 1)
    for low in range(start, end, size):
        yield low, min(low + size, end)
