"""One session: admit a step, stage it, commit it whole or not at all, and answer a replay.

The path of one gradient: `begin` checks who asks and which step it is, and hands out a `GradientStaging` that
chunks are added to outside the lock. `commit` takes the lock, checks everything again, and only then touches
the state, range by range, each range's answer being encoded in the same pass that updates it. Once the first
range is touched the commit runs to its end whatever becomes of the client; what fails there is a broken
device or a bug, and the session says so for ever after instead of going on half-updated.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import numpy as np

from stepwire.errors import StateChangedError
from stepwire.optimizers import Hyperparameters
from stepwire.wire.dtypes import FLOAT32, wire_bytes
from stepwire_server.devices.budget import MemoryBudget, Reservation
from stepwire_server.engines.protocol import PARAM, Engine, EngineState, ExportedMemory, HostArray
from stepwire_server.host.sealed_memory import SharedMemory
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import Outcome, StepResult
from stepwire_server.rules import AVERAGE, Precision
from stepwire_server.rules.loss_scale import LossScale, after_step
from stepwire_server.sessions.client_stream import Attachment
from stepwire_server.sessions.ledger import Ledger
from stepwire_server.steps.check_gradient import GradientCheck, check_gradient
from stepwire_server.steps.commit import Commit, initialize
from stepwire_server.steps.gradient import GradientStaging, StagedChunk
from stepwire_server.steps.overlap import OverlappedStep, unfinished
from stepwire_server.steps.reply import ReplyPipeline, ReplyWriter, send_parameters
from stepwire_server.steps.tensor_steps import TensorSteps
from stepwire_server.steps.update import recipe_for

__all__ = ["ReplyWriter", "Session"]

# Another session's step is over after about as long.
_STEP_RETRY_SECONDS = 0.1


class Session:
    """The optimizer state of one model and the record of its last step. Thread-safe."""

    def __init__(
        self,
        session_id: str,
        config: SessionConfig,
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
        self.config = config
        self.ledger = Ledger(session_id, epoch=epoch, ready=config.start_at_zero)
        self.created = self.last_used = clock()
        self._clock = clock
        self._engine = engine
        self._budget = budget
        self._lock = threading.Lock()
        self._prepared: tuple[Any, ...] = (None, None, None)
        self._progress = TensorSteps(config, [0] * len(config.layout.tensors))
        self._unfinished: OverlappedStep | None = None
        self._parameter_memory: SharedMemory | None = None
        scaling = config.treatment.loss_scaling
        self._loss_scale = None if scaling is None else LossScale(scaling.initial_scale)
        state_bytes = engine.state_bytes(config.slots, config.layout.size, config.kept)
        gradient_bytes = _room_for(config.layout.size, config.gradient_dtype, config.reply_dtype)
        budget.require_possible(state_bytes + gradient_bytes, "the session's state with one gradient")
        self._memory = budget.reserve(state_bytes, "the session's state")
        with contextlib.ExitStack() as made:
            made.callback(self._memory.release)
            self._state = made.enter_context(
                contextlib.closing(engine.allocate(config.slots, config.layout.size, config.kept))
            )
            initialize(config, self._state)
            self._prepare(config.groups, config.gradient_dtype, config.reply_dtype)
            made.pop_all()

    @property
    def session_id(self) -> str:
        """128 random bits in hexadecimal digits."""
        return self.ledger.session_id

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots that are pulled and loaded."""
        return self.config.visible_slots

    @property
    def memory_bytes(self) -> int:
        """Bytes reserved for the state."""
        return self._memory.nbytes

    @property
    def device(self) -> str:
        """Where the state lives."""
        return self._engine.device.name

    @property
    def depth(self) -> int:
        """How many chunks of an answer it pays to have asked for before the first is waited for."""
        return self._state.depth

    @property
    def loss_scale(self) -> float | None:
        """What the next gradient must have been multiplied by; None without loss scaling."""
        return None if self._loss_scale is None else self._loss_scale.scale

    @property
    def unfinished_step(self) -> int:
        """The step that a broken stream left half applied; 0 for none."""
        return 0 if self._unfinished is None else self._unfinished.step

    def expired(self, now: float) -> bool:
        """Tell whether the lease has run out: no stream, and no call for its length."""
        return not self.ledger.worker.attached and now - self.last_used > self.config.lease_seconds

    # --- slots -------------------------------------------------------------------------------------------

    def take_slot(self) -> int:
        """Give slot 0 to a new holder; returns its token."""
        with self._lock:
            return self.ledger.worker.take()

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
            held = self.ledger.worker.attach(attachment, token)
        try:
            yield held
        finally:
            with self._lock:
                self.ledger.worker.detach(attachment)
                self.last_used = self._clock()

    # --- steps -------------------------------------------------------------------------------------------

    def begin(self, request: StepRequest, token: int) -> GradientStaging:
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
            replay = not self._admit(request, token)
            state = self._state
            unscale = 1.0 / (request.loss_scale if self._loss_scale is None else self._loss_scale.scale)
        self._prepare(request.groups, request.gradient_dtype, request.reply_dtype if request.reply else None)
        gradient_bytes = _room_for(self.config.layout.size, request.gradient_dtype, request.reply_dtype)
        room = self._budget.reserve(
            0 if request.shared else gradient_bytes, "the step's gradient", retry_after_seconds=_STEP_RETRY_SECONDS
        )
        active = self.config.without(request.missing)
        return GradientStaging(
            request, active, state, room, unscale=unscale, replay=replay, squares=self.config.squares
        )

    def commit(
        self, request: StepRequest, staging: GradientStaging, token: int, sink: ReplyWriter, began: float
    ) -> StepResult:
        """Apply a staged step, or replay the last one; the parameters go to `sink`.

        Args:
            request: what `begin` admitted.
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
            if not self._admit(request, token, whole=True):
                return self._replay(request, sink)
            if staging.replay:
                raise _no_replay(request)
            if request.reply_base is not None and not self.ledger.answered(request.reply_base):
                request = request._replace(reply_base=None)
            work = Commit(self.config, request, staging, self._state, self._progress)
            started = self._clock()
            skipped = None if work.updates else work.keep(sink)
            with _Changing(self.ledger, "step", request.step):
                outcome = skipped or work.apply(sink)
                times = (committed - began, started - committed, self._clock() - started)
                return self._finish(request, staging, outcome, times)

    def stage(self, request: StepRequest, staging: GradientStaging, token: int) -> GradientCheck | None:
        """Return what a coordinator decides by, before the commit; None where the step is a replay.

        Raises:
            StepwireError: as `commit`; the state is as before.
        """
        with self._lock:
            if not self._admit(request, token, whole=True):
                return None
            if staging.replay:
                raise _no_replay(request)
            return check_gradient(self.config, request, staging, self._state, self._progress)

    # --- steps that are applied as they arrive -----------------------------------------------------------

    def apply(
        self, request: StepRequest, chunk: StagedChunk, token: int, sink: ReplyWriter, answer: ReplyPipeline
    ) -> None:
        """Apply a chunk of an overlapped step, unless it has been, and answer it.

        Raises:
            StepwireError: as `begin`, or it is no longer this step's turn.
        """
        with self._lock:
            if not self._admit(request, token):
                raise StateChangedError(f"step {request.step} was committed while it was sent; send it again")
            self._unfinished = step = self._overlapped(request)
            with _Changing(self.ledger, "step", request.step):
                step.apply(chunk, request, sink, answer)

    def finish(self, request: StepRequest, staging: GradientStaging, token: int, began: float) -> StepResult:
        """Commit an overlapped step, all of which has been applied.

        Raises:
            InvalidRequestError: chunks are missing; the step stays as far as it is.
            StepwireError: as `apply`.
        """
        with self._lock:
            if not self._admit(request, token):
                raise StateChangedError(f"step {request.step} was committed while it was sent; send it again")
            outcome = self._overlapped(request).finish(staging)
            self._unfinished = None
            now = self._clock()
            return self._finish(request, staging, outcome, (now - began, 0.0, 0.0))

    def _overlapped(self, request: StepRequest) -> OverlappedStep:
        """Return the step that is half applied, or a new one, of which nothing is yet."""
        return self._unfinished or OverlappedStep(self.config, request, self._state, self._progress)

    def _admit(self, request: StepRequest, token: int, *, whole: bool = False) -> bool:
        """Return False for a replay; `whole` says that the step will not go on with one that is half applied."""
        self.last_used = self._clock()
        following = self.ledger.admit_step(request.step, request.epoch, token)
        if following and self._unfinished is not None:
            self._unfinished.check_continued_by(request._replace(overlap=request.overlap and not whole))
        return following

    def _finish(
        self, request: StepRequest, staging: GradientStaging, outcome: Outcome, times: tuple[float, float, float]
    ) -> StepResult:
        """Count the step, and note what it did."""
        if outcome.updated:
            self._progress.advance(staging.active)
        scaling = self.config.treatment.loss_scaling
        if self._loss_scale is not None and scaling is not None:
            self._loss_scale = after_step(self._loss_scale, scaling, finite=not outcome.skipped)
        record = outcome.record(request.step, self.ledger.epoch, self._progress.group_steps(), times, self.loss_scale)
        self.ledger.commit_step(record)
        return record

    def _replay(self, request: StepRequest, sink: ReplyWriter) -> StepResult:
        assert self.ledger.last_result is not None  # that is what made it a replay
        send_parameters(self._state, self.config.layout, request, sink)
        return self.ledger.last_result.replay()

    # --- state in and out --------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the present moment: `read` compares it, so that a pull is of one moment.

        Raises:
            SessionNotReadyError, SessionNotFoundError, DataLossError: there is nothing to read.
        """
        with self._lock:
            self._check_readable()
            steps = self._progress.tensor_steps()
            return Snapshot(self.ledger.applied_step, self.ledger.applied_load, steps, self._loss_scale)

    def read(self, snapshot: Snapshot, slot: str, start: int, out: HostArray) -> None:
        """Encode a range of a slot as of `snapshot`.

        Raises:
            StateChangedError: a step or a load was committed since.
        """
        with self._lock:
            self._check_readable()
            now = (self.ledger.applied_step, self.ledger.applied_load)
            if now != (snapshot.step, snapshot.load):
                raise StateChangedError(
                    f"the session moved from step {snapshot.step}, load {snapshot.load} to step {now[0]}, load "
                    f"{now[1]} during the pull; pull again",
                    metadata={"step": snapshot.step, "applied_step": now[0]},
                )
            self._state.read(slot, start, out).wait()

    def _check_readable(self) -> None:
        self.ledger.check_usable()
        self.last_used = self._clock()
        if self._unfinished is not None:
            raise StateChangedError(
                f"step {self._unfinished.step} is half applied; pull when it is finished",
                metadata={"unfinished_step": self._unfinished.step},
            )

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
        held, size = dict.fromkeys(slots, Precision.FLOAT32), self.config.layout.size
        room = self._budget.reserve(self._engine.state_bytes(held, size), "staging the load")
        try:
            return self._engine.allocate(held, size), room
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
        loss_scale: LossScale | None = None,
    ) -> bool:
        """Put staged slots in the place of the present ones; False if it had been committed before.

        Raises:
            StepwireError: as `admit_load`; the state is as before.
        """
        with self._lock:
            if not self.ledger.admit_load(token, load, step):
                return False
            if self._unfinished is not None and (step is None or set(slots) != set(self.slots)):
                raise unfinished(self._unfinished.step, "finish it")
            with _Changing(self.ledger, "load", load):
                self._state.adopt(staged)
                if AVERAGE in self.config.slots and PARAM in slots and AVERAGE not in slots and not self.ledger.ready:
                    self._state.copy(PARAM, AVERAGE)
                self._state.settle()
            self._unfinished = None
            self.ledger.commit_load(load, step, parameters=PARAM in slots)
            if tensor_steps:
                self._progress = TensorSteps(self.config, tensor_steps)
            self._loss_scale = loss_scale or self._loss_scale
            return True

    # --- memory that is shared with the client -----------------------------------------------------------

    def room(self, nbytes: int, purpose: str) -> Reservation:
        """Reserve memory beside the state.

        Raises:
            ResourceExhaustedError: it does not fit.
        """
        return self._budget.reserve(nbytes, purpose)

    def pin(self, memory: HostArray) -> contextlib.AbstractContextManager[None]:
        """See `Engine.pin`; no step may be under way in the memory when the block ends."""
        return self._engine.pin(memory)

    def export(self, nbytes: int) -> ExportedMemory:
        """See `Engine.export`; the caller has reserved the bytes.

        Raises:
            UnsupportedFeatureError, ResourceExhaustedError: as there.
        """
        return self._engine.export(nbytes)

    def moved_parameters(self) -> SharedMemory | None:
        """Return the memory that the parameters were moved to, for the caller to close; None if they were not.

        Raises:
            SessionNotFoundError, DataLossError: there is no sound state.
            OSError: the system has no descriptors left.
        """
        with self._lock:
            self.ledger.check_sound()
            return None if self._parameter_memory is None else self._parameter_memory.duplicate()

    def move_parameters(self, memory: SharedMemory) -> bool:
        """Hold the parameters in `memory` for the rest of the session's life, and close it then.

        Returns:
            False where they cannot lie in memory of the host, or lie in such memory already; nothing has changed then.

        Raises:
            SessionNotFoundError, DataLossError: there is no sound state to move.
        """
        with self._lock:
            self.ledger.check_sound()
            if self._parameter_memory is not None:
                return False
            self._prepare(self.config.groups, self.config.gradient_dtype, None)  # steps will have no answer
            if not self._state.move(PARAM, memory.array(FLOAT32, self.config.layout.size)):
                return False
            self._parameter_memory = memory
            return True

    def read_parameters(self, out: HostArray) -> None:
        """Encode the present parameters, be there any or not, into `out`, `(size,)` of a wire dtype.

        Raises:
            SessionNotFoundError, DataLossError: there is no sound state to read.
        """
        with self._lock:
            self.ledger.check_sound()
            self._state.read(PARAM, 0, out).wait()

    # --- end of life -------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the session after the commit under way and free its memory. Closing twice is harmless."""
        with self._lock:
            if not self.ledger.closed:
                self.ledger.closed = True
                self.ledger.worker.orphan()
                try:
                    self._state.close()
                finally:
                    self._memory.release()
                    if self._parameter_memory is not None:
                        self._parameter_memory.close()

    def _prepare(
        self, groups: tuple[Hyperparameters, ...], gradient: np.dtype[Any], reply: np.dtype[Any] | None
    ) -> None:
        """Compile what a step needs, unless the step before needed the same."""
        if (gradient, reply) == self._prepared[1:] and groups is self._prepared[0]:
            return
        for hyper in groups:
            self._engine.prepare(recipe_for(self.config, hyper), gradient, reply)
        self._prepared = (groups, gradient, reply)


class _Changing:
    """Says that the state is damaged if something fails in a block that changes it."""

    __slots__ = ("_ledger", "_number", "_what")

    def __init__(self, ledger: Ledger, what: str, number: int) -> None:
        self._ledger = ledger
        self._what = what
        self._number = number

    def __enter__(self) -> None:
        """Change the state from here on."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._ledger.damaged_by(f"{self._what} {self._number}")


def _no_replay(request: StepRequest) -> StateChangedError:
    return StateChangedError(f"step {request.step} was a replay when it began and is not now; send it again")


@functools.lru_cache(256)
def _room_for(size: int, gradient: np.dtype[Any], reply: np.dtype[Any]) -> int:
    """Return the bytes that a step takes at its peak: its gradient, or its answer where that is larger."""
    return max(wire_bytes(gradient, size), wire_bytes(reply, size))
