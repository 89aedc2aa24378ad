"""The state of a session: where its arrays reside, and the numbers beside them.

Residency is the session's share of a machine: arrays on a device, and the reservation for them. The numbers are plain
data: a `Snapshot` holds them all, as a pull tells them and a load brings them. Nothing here locks or knows the order of
steps: the session does.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stepwire.optimizers import Hyperparameters
from stepwire.wire.dtypes import FLOAT32, wire_bytes
from stepwire_server.devices.budget import Reservation
from stepwire_server.devices.fair_share import Flow
from stepwire_server.devices.fair_state import FairState
from stepwire_server.devices.pool import Device
from stepwire_server.engines.protocol import PARAM, EngineState, HostArray, Table
from stepwire_server.engines.regions import Holding
from stepwire_server.host.sealed_memory import SharedMemory
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rules import ACCUMULATED, AVERAGE, Precision
from stepwire_server.rules.loss_scale import LossScale, after_step
from stepwire_server.sessions.capture import Capture
from stepwire_server.sessions.first_state import first_ids, initialize
from stepwire_server.sessions.hashed_state import HashedState, make_rows
from stepwire_server.sessions.row_numbers import first_numbers, present_numbers
from stepwire_server.sessions.session_kernels import compile_kernels
from stepwire_server.steps.gradient import Room, StagedGradient
from stepwire_server.steps.overlap import OverlappedStep
from stepwire_server.steps.result import Effect
from stepwire_server.steps.row_gradients import row_gradients, step_row_bytes
from stepwire_server.steps.row_ids import RowIds, row_id_bytes
from stepwire_server.steps.tensor_steps import TensorSteps

__all__ = ["Residency", "SessionState"]

# Another session's step is over after about as long.
_STEP_RETRY_SECONDS = 0.1
_COPY_ELEMENTS = 1 << 20


class Residency:
    """Arrays on a device, with the reservation that covers them.

    Attributes:
        arrays: the engine's arrays.
        nbytes: the reserved bytes.
    """

    def __init__(self, arrays: EngineState, reservation: Reservation) -> None:
        """Own both."""
        self.arrays = arrays
        self._reservation = reservation

    @classmethod
    def allocate(cls, device: Device, slots: Mapping[str, Holding], config: SessionConfig, purpose: str) -> Residency:
        """Reserve, then allocate.

        Raises:
            ResourceExhaustedError: they do not fit; nothing stays reserved.
        """
        size, engine = config.layout.size, device.engine
        reservation = device.budget.reserve(engine.state_bytes(slots, size), purpose)
        with contextlib.ExitStack() as undo:
            undo.callback(reservation.release)
            arrays = engine.allocate(slots, size)
            undo.pop_all()
        return cls(arrays, reservation)

    def in_turns(self, size: int, flow: Flow, ids: Mapping[int, RowIds] | None = None) -> Residency:
        """Have passes over the arrays, of `size` elements, wait for turns of their engine from now on.

        Rows of a table that is among `ids`, by its first element, are named by its ids.
        """
        self.arrays = HashedState(self.arrays, size, flow, ids) if ids else FairState(self.arrays, size, flow)
        return self

    @property
    def nbytes(self) -> int:
        """Bytes that are reserved."""
        return self._reservation.nbytes

    def close(self) -> None:
        """Give the memory back. Closing twice is harmless."""
        try:
            self.arrays.close()
        finally:
            self._reservation.release()


class SessionState:
    """The arrays and numbers of one session. Not thread-safe: the session serialises its calls.

    Attributes:
        config: the session's config.
        device: the device that the arrays reside on.
        flow: the place among all sessions that share the engine.
        arrays: the engine's arrays.
        tensor_steps: Adam's t of each tensor, and its scalar.
        loss_scale: the state of dynamic loss scaling; None without it.
        unfinished: the step that a broken stream left half applied; None for none.
        sum_bound: no element of the accumulated gradient is larger in magnitude; infinity where that is not known.
        capture: the moment that is being read for a checkpoint; None for none.
        row_numbers: by index, the numbers of the rows of each table that keeps some.
        row_ids: by index, the ids of the rows of each table whose rows are named by ids.
    """

    def __init__(self, config: SessionConfig, device: Device) -> None:
        """Reserve, allocate, and compile the kernels of the usual step.

        Raises:
            ResourceExhaustedError: the state does not fit; nothing stays reserved.
        """
        self.config = config
        self.device = device
        self.tensor_steps = TensorSteps(config, [0] * len(config.layout.tensors))
        scaling = config.treatment.loss_scaling
        self.loss_scale = None if scaling is None else LossScale(scaling.initial_scale)
        self.unfinished: OverlappedStep | None = None
        self.capture: Capture | None = None
        self.sum_bound = 0.0
        self._prepared: tuple[Any, ...] = (None, None, None, True)
        self._parameter_memory: SharedMemory | None = None
        state_bytes = device.engine.state_bytes(config.slots, config.layout.size)
        gradient_bytes = _step_bytes(config.layout.dense_extent, config.gradient_dtype, config.reply_dtype)
        described_bytes = config.description_bytes + config.row_number_bytes
        described_bytes += sum(row_id_bytes(config.layout.tensors[index]) for index in config.hashed_tables)
        needed = state_bytes + gradient_bytes + described_bytes
        device.budget.require_possible(needed, "the session's state with one gradient")
        self.flow = device.share.flow(2 * state_bytes + gradient_bytes)
        with contextlib.ExitStack() as undo:
            self._description = device.budget.reserve(described_bytes, "the session's tensors")
            undo.callback(self._description.release)
            self.row_numbers, self.row_ids = first_numbers(config), first_ids(config)
            residency = Residency.allocate(device, config.slots, config, "the session's state")
            self._ids = {config.layout.tensors[index].offset: (index, ids) for index, ids in self.row_ids.items()}
            named = {start: ids for start, (_, ids) in self._ids.items()}
            self._residency = residency.in_turns(config.layout.size, self.flow, named)
            self.arrays = self._residency.arrays
            undo.callback(self._residency.close)
            initialize(config, self.arrays)
            self.prepare(config.groups, config.gradient_dtype, config.reply_dtype)
            undo.pop_all()

    @property
    def nbytes(self) -> int:
        """Bytes reserved for the arrays, and for the description of many tensors."""
        return self._residency.nbytes + self._description.nbytes

    def prepare(
        self,
        groups: tuple[Hyperparameters, ...],
        gradient: np.dtype[Any],
        reply: np.dtype[Any] | None,
        *,
        rows: bool = True,
    ) -> None:
        """Compile what a step needs, unless the step before needed the same; `rows` says that rows go back too."""
        rows = rows and bool(self.config.tables)
        if (gradient, reply, rows) == self._prepared[1:] and groups is self._prepared[0]:
            return
        tenant = self.flow.tenant
        with contextlib.nullcontext() if tenant is None else self.device.kernels.asked_by(tenant):
            compile_kernels(self.device.engine, self.config, groups, gradient, reply, rows)
        self._prepared = (groups, gradient, reply, rows)

    # --- steps -------------------------------------------------------------------------------------------

    def stage_gradient(self, request: StepRequest, unscale: float, room: Room | None = None) -> StagedGradient:
        """Make room for a step's gradient.

        Args:
            request: the step.
            unscale: the factor that the gradient is multiplied by first.
            room: the memory that it has already; None to reserve some.

        Raises:
            ResourceExhaustedError: no room just now.
        """
        config = self.config
        room = self.reserve_step(request) if room is None else room
        try:
            dtype, selection, sums = request.gradient_dtype, config.without(request.missing), config.squares
            gradient = StagedGradient(dtype, selection, self.arrays, room, unscale=unscale, sums=sums)
            if config.tables:
                gradient.rows = row_gradients(request, selection, self.arrays)
        except BaseException:
            room.release()
            raise
        return gradient

    def reserve_step(self, request: StepRequest) -> Reservation:
        """Reserve room for a step's gradient or its reply, the larger of both; for both where the reply has an order.

        Raises:
            ResourceExhaustedError: no room just now, or never, in which case nobody else makes room for it.
        """
        size = self.config.layout.dense_extent
        nbytes = 0 if request.shared else _step_bytes(size, request.gradient_dtype, request.reply_dtype)
        if request.reply_first and request.reply:  # chunks stay while others are replied to: both are there at a time
            nbytes = wire_bytes(request.gradient_dtype, size) + wire_bytes(request.reply_dtype, size)
        nbytes += step_row_bytes(request, self.config.layout)
        if request.tables or request.reply_first:  # more than the one gradient that fitted at the creation
            self.device.budget.require_possible(self.nbytes + nbytes, "the session's state with this step")
        return self.device.budget.reserve(nbytes, "the step's gradient", retry_after_seconds=_STEP_RETRY_SECONDS)

    def reserve_rows(self, request: StepRequest) -> Reservation | None:
        """Reserve room for the rows of a step whose gradient is not needed, as `reserve_step`: they name the reply."""
        if not (nbytes := step_row_bytes(request, self.config.layout)):
            return None
        return self.device.budget.reserve(nbytes, "the step's rows", retry_after_seconds=_STEP_RETRY_SECONDS)

    def unscale(self, request: StepRequest) -> float:
        """Return the factor that a step's gradient is multiplied by first."""
        return 1.0 / (request.loss_scale if self.loss_scale is None else self.loss_scale.scale)

    def advance(self, gradient: StagedGradient, effect: Effect, groups: Sequence[Hyperparameters]) -> None:
        """Count a step that has changed the arrays, or was skipped; growth of the loss scale counts updates alone."""
        if effect is Effect.ACCUMULATED:
            self.sum_bound += math.sqrt(math.fsum(gradient.squared_norms()))
            return
        self.sum_bound = 0.0
        if effect is Effect.UPDATED:
            self.tensor_steps.advance(gradient.selection, groups)
        scaling = self.config.treatment.loss_scaling
        if self.loss_scale is not None and scaling is not None:
            self.loss_scale = after_step(self.loss_scale, scaling, finite=effect is not Effect.SKIPPED)

    def before_change(self, start: int, end: int) -> None:
        """Note that the flat elements `[start, end)` of all slots are about to change."""
        if self.capture is not None:
            self.capture.preserve(start, end)

    def before_rows(self, table: Table, rows: HostArray) -> None:
        """Note that some rows of a table are about to change in all slots; they rise. Make those of new ids."""
        (index, ids), new = self._ids.get(table.start, (0, None)), rows[:0]
        if ids is not None:
            rows, new = ids.place(rows, self.tensor_steps.tensor_steps()[index] + 1)
        if self.capture is not None:
            self.capture.preserve_rows(table, rows)
        if ids is not None:
            make_rows(self.arrays, tuple(self.config.slots), table, ids, new)

    def numbers_of(self, tensor: int, rows: HostArray) -> HostArray:
        """Return the numbers of some rows of a table that keeps them; those of a new id are the first ones."""
        return present_numbers(self.config, self.row_numbers[tensor], self.row_ids.get(tensor), rows)

    def note_numbers(self, tensor: int, rows: HostArray, numbers: HostArray) -> None:
        """Keep the numbers of some rows after an update."""
        ids = self.row_ids.get(tensor)
        self.row_numbers[tensor][rows if ids is None else ids.find(rows)] = numbers

    def overlapped(self, request: StepRequest) -> OverlappedStep:
        """Return the step that is half applied, or a new one, of which nothing is yet."""
        return self.unfinished or OverlappedStep(request, self)

    # --- state in and out --------------------------------------------------------------------------------

    def snapshot(self, step: int, load: int) -> Snapshot:
        """Return the numbers of the present moment, after the given step and load."""
        counted = self.tensor_steps
        return Snapshot(step, load, counted.tensor_steps(), self.loss_scale, counted.tensor_scalars())

    def read(self, slot: str, start: int, out: HostArray) -> None:
        """Encode a range of a slot into `out`, `(n,)` of a wire dtype."""
        self.arrays.read(slot, start, out).wait()

    def stage_load(self, slots: Sequence[str]) -> Residency:
        """Allocate room for a load beside the state, so that a broken one changes nothing.

        Raises:
            ResourceExhaustedError: it does not fit.
        """
        held = dict.fromkeys(slots, Precision.FLOAT32)
        residency = Residency.allocate(self.device, held, self.config, "staging the load")
        return residency.in_turns(self.config.layout.size, self.flow)

    def adopt(self, staged: Residency, request: LoadRequest, *, first: bool) -> None:
        """Put staged slots in the place of the present ones, with the numbers that the load brings.

        Args:
            staged: used up.
            request: names the slots.
            first: no parameters have been loaded before: their average starts from them.
        """
        self.before_change(0, self.config.layout.size)
        self.arrays.adopt(staged.arrays)
        averages = AVERAGE in self.config.slots and AVERAGE not in request.slots
        if averages and first and PARAM in request.slots:
            self.arrays.copy(PARAM, AVERAGE)
        self.arrays.settle()
        self.unfinished = None
        if ACCUMULATED in request.slots:
            self.sum_bound = math.inf if request.sum_bound is None else request.sum_bound
        if request.tensor_steps or request.tensor_scalars:
            steps = request.tensor_steps or self.tensor_steps.tensor_steps()
            self.tensor_steps = TensorSteps(self.config, steps, request.tensor_scalars)
        self.loss_scale = request.loss_scale or self.loss_scale

    # --- memory that is shared with the client -----------------------------------------------------------

    def moved_parameters(self) -> SharedMemory | None:
        """Return the memory that the parameters were moved to, for the caller to close; None if they were not.

        Raises:
            OSError: the system has no descriptors left.
        """
        return None if self._parameter_memory is None else self._parameter_memory.duplicate()

    def move_parameters(self, memory: SharedMemory) -> bool:
        """Hold the parameters in `memory` for the rest of the session's life, and close it then.

        Returns:
            False where they cannot lie in memory of the host, or lie in such memory already; nothing has changed then.
        """
        if self._parameter_memory is not None:
            return False
        self.prepare(self.config.groups, self.config.gradient_dtype, None)  # steps will have no reply
        if not self.arrays.move(PARAM, memory.array(FLOAT32, self.config.layout.size)):
            return False
        self._parameter_memory = memory
        return True

    def close(self) -> None:
        """Free the memory. Closing twice is harmless."""
        try:
            self._residency.close()
        finally:
            self.row_numbers = {}
            self._description.release()
            if self._parameter_memory is not None:
                self._parameter_memory.close()


@functools.lru_cache(256)
def _step_bytes(size: int, gradient: np.dtype[Any], reply: np.dtype[Any]) -> int:
    """Return the bytes that a step takes at its peak: its gradient, or its reply where that is larger."""
    return max(wire_bytes(gradient, size), wire_bytes(reply, size))
