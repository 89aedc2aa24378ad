"""One step on its way through a session, and the state that it acts on."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from stepwire.errors import InvalidRequestError, Reason
from stepwire_server.durability.session_log import EntryLog
from stepwire_server.engines.protocol import EngineState, HostArray, Table
from stepwire_server.records.round_result import RoundResult
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import Decision, StepRequest
from stepwire_server.rules.loss_scale import LossScale
from stepwire_server.steps.gradient import Room, StagedGradient
from stepwire_server.steps.row_gradients import NamedRows
from stepwire_server.steps.row_ids import RowIds
from stepwire_server.steps.tensor_steps import TensorSteps

__all__ = ["Hold", "Step", "SteppedState"]


class SteppedState(Protocol):
    """The state of a session, as a step changes it.

    Attributes:
        config: the session's config.
        arrays: the engine's arrays.
        tensor_steps: Adam's t of each tensor, and its scalar.
        loss_scale: the state of dynamic loss scaling; None without it.
        sum_bound: no element of the accumulated gradient is larger in magnitude; infinity where that is not known.
        row_numbers: by index, the numbers of the rows of each table that keeps some, `(rows,)` uint32 or float32: see
            `RowSemantics.counts_rows`.
        row_ids: by index, the ids of the rows of each table whose rows are named by ids.
    """

    config: SessionConfig
    arrays: EngineState
    tensor_steps: TensorSteps
    loss_scale: LossScale | None
    sum_bound: float
    row_numbers: dict[int, HostArray]
    row_ids: dict[int, RowIds]

    def before_rows(self, table: Table, rows: HostArray) -> None:
        """Note that some rows of a table are about to change in all slots; they rise. Make those of new ids."""
        ...

    def numbers_of(self, tensor: int, rows: HostArray) -> HostArray:
        """Return the numbers of some rows of a table that keeps them; those of a new id are the first ones."""
        ...

    def note_numbers(self, tensor: int, rows: HostArray, numbers: HostArray) -> None:
        """Keep the numbers of some rows after an update."""
        ...

    def before_change(self, start: int, end: int) -> None:
        """Note that the flat elements `[start, end)` of all slots are about to change."""
        ...


class Hold(Protocol):
    """The hold of a worker that a step began under. Compared by identity."""

    @property
    def worker(self) -> int:
        """The worker's number."""
        ...

    @property
    def generation(self) -> int:
        """The number of the hold."""
        ...

    @property
    def acquired(self) -> int:
        """The generation in which the client acquired the worker."""
        ...

    @property
    def transport(self) -> str:
        """The way that its steps come; see `Committed`."""
        ...


class Step:
    """One step from its first message to its commit. A context manager, which lets go of its gradient.

    Nothing here touches the session: a stream that breaks drops the object, and no trace is left.

    Attributes:
        request: the step as it was asked for.
        holder: the hold that it began under; nothing commits under an older one.
        gradient: the gradient as it arrives.
        replay: the step had been applied when it began: its chunks are not kept.
        decision: the coordinator's, once it is known; None where there is none.
        entry: the step's entry in the log; None where none is kept.
        began: the clock reading of its first message.
        received: the clock reading of its commit message; that of its first message until then.
        contribution: the number that the worker gave it; with aggregation another one than the step's.
        parts: for each worker whose gradient is in it, the part in the result; empty without aggregation.
        reduced: the gradient is that of a round: float32, unscaled.
        slot: the place among the uploads of several workers; None for none.
        reduce_seconds: the time of making one gradient of those of several workers.
        sync_seconds: the time of waiting for the disk; 0 without a log.
    """

    __slots__ = (
        "_named_rows",
        "began",
        "contribution",
        "decision",
        "entry",
        "gradient",
        "holder",
        "parts",
        "received",
        "reduce_seconds",
        "reduced",
        "replay",
        "request",
        "slot",
        "sync_seconds",
    )

    def __init__(
        self,
        request: StepRequest,
        holder: Hold,
        gradient: StagedGradient,
        *,
        replay: bool,
        began: float,
        entry: EntryLog | None = None,
    ) -> None:
        """Await the chunks of a step."""
        self.entry = entry
        self.request = request
        self.holder = holder
        self.gradient = gradient
        self.replay = replay
        self.decision: Decision | None = None
        self.began = self.received = began
        self.contribution = request.step
        self.parts: Sequence[tuple[int, RoundResult]] = ()
        self.reduced = False
        self.slot: Room | None = None
        self._named_rows: Sequence[NamedRows] | None = None
        self.reduce_seconds = self.sync_seconds = 0.0

    def add(self, offset: int, count: int, payload: HostArray) -> None:
        """Stage one chunk: `payload` is its received bytes, `(n,) uint8`.

        Raises:
            InvalidRequestError: range, overlap or byte count are wrong; the chunks before it stay.
        """
        if not self.replay:
            self.gradient.add(offset, count, payload)
            if self.entry is not None:
                self.entry.chunk(offset, count, payload)

    def add_rows(self, offset: int, count: int, rows: HostArray, payload: HostArray) -> None:
        """Stage one chunk of rows, `(k,) uint64`; those of a replay tell which rows go back.

        Raises:
            InvalidRequestError: the table, a row, or a number of rows or bytes is wrong; the chunks before it stay.
        """
        if self.gradient.rows is None:
            raise InvalidRequestError.of("chunk.rows", "the session has no tables", reason=Reason.INVALID_TENSOR)
        self.gradient.rows.add(offset, count, rows, payload)
        if self.entry is not None and not self.replay:
            self.entry.rows(offset, count, rows, payload)

    def named_rows(self) -> Sequence[NamedRows]:
        """Return the rows of tables that came, each once; nothing in a session without tables.

        They are known after the end of the gradient too, if they were asked for before.
        """
        if self._named_rows is None:
            self._named_rows = () if self.gradient.rows is None else self.gradient.rows.named()
        return self._named_rows

    def close(self) -> None:
        """Let go of the gradient, and of the entry in the log. Closing twice is harmless."""
        self.gradient.close()
        if self.entry is not None:
            self.entry.close()

    def __enter__(self) -> Step:
        """Hold the gradient for a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the gradient."""
        self.close()
