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
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from stepwire.errors import NonFiniteGradientError, StateChangedError
from stepwire.optimizers import Hyperparameters
from stepwire_server import rules
from stepwire_server.engines.protocol import PARAM, Engine, EngineState, HostArray
from stepwire_server.ledger import Ledger
from stepwire_server.memory import MemoryBudget, Reservation
from stepwire_server.plan import NonFinitePolicy, SessionPlan, StepOrder
from stepwire_server.progress import GroupRecord, Progress, Snapshot, SteppedRun, StepRecord
from stepwire_server.slot import Attachment
from stepwire_server.staging import GradientStaging, StagedChunk

__all__ = ["ReplySink", "Session"]

STATE_ITEMSIZE = 4
"""Bytes of one element of state: float32."""

# Another session's step is over after about as long.
_STEP_RETRY_SECONDS = 0.1


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
        self.plan = plan
        self.slots = (PARAM, *rules.slots_for(plan.optimizer))
        self.ledger = Ledger(session_id, epoch=epoch, ready=plan.start_at_zero)
        self.created = self.last_used = clock()
        self._clock = clock
        self._engine = engine
        self._budget = budget
        self._lock = threading.Lock()
        self._prepared: tuple[Any, ...] = (None, None, None)
        self._progress = Progress(plan.layout, [0] * len(plan.layout.tensors))
        state_bytes = STATE_ITEMSIZE * plan.layout.size * len(self.slots)
        gradient_bytes = plan.layout.size * max(plan.gradient_dtype.itemsize, plan.reply_dtype.itemsize)
        budget.require_possible(state_bytes + gradient_bytes, "the session's state with one gradient")
        self._memory = budget.reserve(state_bytes, "the session's state")
        try:
            self._state = engine.allocate(self.slots, plan.layout.size)
            self._prepare(plan.groups, plan.gradient_dtype, plan.reply_dtype)
        except BaseException:
            self._memory.release()
            raise

    @property
    def session_id(self) -> str:
        """128 random bits in hexadecimal digits."""
        return self.ledger.session_id

    @property
    def memory_bytes(self) -> int:
        """Bytes reserved for the state."""
        return self._memory.nbytes

    @property
    def device(self) -> str:
        """Where the state lives."""
        return self._engine.device.name

    def expired(self, now: float) -> bool:
        """Tell whether the lease has run out: no stream, and no call for its length."""
        return not self.ledger.slot.attached and now - self.last_used > self.plan.lease_seconds

    # --- slots -------------------------------------------------------------------------------------------

    def take_slot(self) -> int:
        """Give slot 0 to a new holder; returns its token."""
        with self._lock:
            return self.ledger.slot.take()

    @contextlib.contextmanager
    def attached(self, attachment: Attachment, token: int, epoch: int) -> Iterator[int]:
        """Keep a stream attached for a block; yields its token.

        Raises:
            FencedError: the token or the epoch is not the newest.
            SessionNotFoundError: the session has ended.
        """
        with self._lock:
            self.ledger.check_epoch(epoch)
            self.ledger.check_open()
            held = self.ledger.slot.attach(attachment, token)
        try:
            yield held
        finally:
            with self._lock:
                self.ledger.slot.detach(attachment)
                self.last_used = self._clock()

    # --- steps -------------------------------------------------------------------------------------------

    def begin(self, order: StepOrder, token: int) -> GradientStaging:
        """Admit a step and make room for its gradient, or for the answer where that is larger.

        Raises:
            FencedError: the token or the epoch is not the newest.
            SessionNotFoundError: the session has ended.
            SessionNotReadyError: parameters have not been loaded.
            StepMismatchError: neither the next step nor a replay.
            DataLossError: the state is damaged.
            ResourceExhaustedError: no room just now.
        """
        with self._lock:
            replay = not self._admit(order, token)
            state = self._state
        self._prepare(order.groups, order.gradient_dtype, order.reply_dtype)
        itemsize = max(order.gradient_dtype.itemsize, order.reply_dtype.itemsize)
        room = self._budget.reserve(
            self.plan.layout.size * itemsize, "the step's gradient", retry_after_seconds=_STEP_RETRY_SECONDS
        )
        return GradientStaging(order, self.plan.layout, state, room, replay=replay)

    def commit(
        self, order: StepOrder, staging: GradientStaging, token: int, sink: ReplySink, began: float
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
            if staging.replay:
                raise StateChangedError(f"step {order.step} was a replay when it began and is not now; send it again")
            staging.complete()
            self._check_finite(staging)
            started = self._clock()
            skipped = bool(staging.non_finite_count) and self.plan.non_finite is NonFinitePolicy.SKIP
            if skipped:
                self._send_parameters(order, sink)
            try:
                if not skipped:
                    self._update(order, staging, sink)
                times = (committed - began, started - committed, self._clock() - started)
                record = self._record(order, staging, skipped, times)
                self.ledger.commit_step(record)
            except BaseException:
                self.ledger.damaged_by(f"step {order.step}")
                raise
            return record

    def _admit(self, order: StepOrder, token: int) -> bool:
        self.last_used = self._clock()
        return self.ledger.admit_step(order.step, order.epoch, token)

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

    def _record(
        self, order: StepOrder, staging: GradientStaging, skipped: bool, times: tuple[float, float, float]
    ) -> StepRecord:
        return StepRecord(
            step=order.step,
            epoch=self.ledger.epoch,
            skipped=skipped,
            grad_norm=math.sqrt(math.fsum(staging.squared_norms)),
            non_finite_count=staging.non_finite_count,
            groups=tuple(
                GroupRecord(math.sqrt(squared), hyper, t)
                for squared, hyper, t in zip(
                    staging.squared_norms, order.groups, self._progress.group_steps(), strict=True
                )
            ),
            receive_seconds=times[0],
            queue_seconds=times[1],
            apply_seconds=times[2],
        )

    def _update(self, order: StepOrder, staging: GradientStaging, sink: ReplySink) -> None:
        runs = self._progress.next_step(self.plan.optimizer, order.groups)
        most = order.reply_elements if order.reply else self.plan.layout.size
        for chunk in staging.drain():
            for start, end in _pieces(chunk.offset, chunk.end, most):
                out = sink.buffer(start, end - start) if order.reply else None
                self._update_piece(runs, chunk, start, end, out)
                if order.reply:
                    sink.flush()
        self._progress.advance()

    def _update_piece(
        self, runs: list[SteppedRun], chunk: StagedChunk, start: int, end: int, out: HostArray | None
    ) -> None:
        """Update flat elements `[start, end)`; padding is answered with zeros."""
        done = start
        first = bisect_right(runs, start, key=lambda run: run.end)
        past = bisect_left(runs, end, lo=first, key=lambda run: run.start)
        for run_start, run_end, rule, scalars in runs[first:past]:
            low, high = max(run_start, start), min(run_end, end)
            target = None
            if out is not None:
                target = out[low - start : high - start]
                if low > done:
                    out[done - start : low - start] = 0
            self._state.update(rule, scalars, low, chunk.gradient, low - chunk.offset, high - chunk.offset, target)
            done = high
        if out is not None and done < end:
            out[done - start :] = 0

    def _replay(self, order: StepOrder, sink: ReplySink) -> StepRecord:
        assert self.ledger.last_record is not None  # that is what made it a replay
        self._send_parameters(order, sink)
        return self.ledger.last_record.replay()

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
            self.ledger.check_usable()
            self.last_used = self._clock()
            return Snapshot(self.ledger.applied_step, self.ledger.applied_load, self._progress.tensor_steps())

    def read(self, snapshot: Snapshot, slot: str, start: int, out: HostArray) -> None:
        """Encode a range of a slot as of `snapshot`.

        Raises:
            StateChangedError: a step or a load was committed since.
        """
        with self._lock:
            self.ledger.check_usable()
            self.last_used = self._clock()
            now = (self.ledger.applied_step, self.ledger.applied_load)
            if now != (snapshot.step, snapshot.load):
                raise StateChangedError(
                    f"the session moved from step {snapshot.step}, load {snapshot.load} to step {now[0]}, load "
                    f"{now[1]} during the pull; pull again",
                    metadata={"step": snapshot.step, "applied_step": now[0]},
                )
            self._state.read(slot, start, out)

    def admit_load(self, token: int, load: int, step: int | None) -> bool:
        """Return True for the next load and False for a replay of the last.

        Raises:
            StepwireError: as `Ledger.admit_load`.
        """
        with self._lock:
            self.last_used = self._clock()
            return self.ledger.admit_load(token, load, step)

    def stage_load(self, slots: tuple[str, ...]) -> tuple[EngineState, Reservation]:
        """Allocate room for a load beside the state, so that a broken one changes nothing.

        Raises:
            ResourceExhaustedError: it does not fit.
        """
        room = self._budget.reserve(STATE_ITEMSIZE * self.plan.layout.size * len(slots), "staging the load")
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
            if not self.ledger.admit_load(token, load, step):
                return False
            try:
                self._state.adopt(staged)
            except BaseException:
                self.ledger.damaged_by(f"load {load}")
                raise
            self.ledger.commit_load(load, step, parameters=PARAM in slots)
            if tensor_steps:
                self._progress = Progress(self.plan.layout, tensor_steps)
            return True

    # --- end of life -------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the session after the commit under way and free its memory. Closing twice is harmless."""
        with self._lock:
            if not self.ledger.closed:
                self.ledger.closed = True
                self.ledger.slot.orphan()
                self._state.close()
                self._memory.release()

    def _prepare(self, groups: tuple[Hyperparameters, ...], gradient: np.dtype[Any], reply: np.dtype[Any]) -> None:
        """Compile what a step needs, unless the step before needed the same."""
        if (gradient, reply) == self._prepared[1:] and groups is self._prepared[0]:
            return
        for hyper in groups:
            self._engine.prepare(rules.rule_for(self.plan.optimizer, hyper), gradient, reply)
        self._prepared = (groups, gradient, reply)


def _pieces(start: int, end: int, most: int) -> list[tuple[int, int]]:
    """Cut `[start, end)` into pieces of at most `most` elements."""
    return [(low, min(low + most, end)) for low in range(start, end, most)]
