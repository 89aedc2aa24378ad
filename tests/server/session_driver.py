"""A session driven without a server: steps, pulls and loads as a stream would ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.engines import Engine
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.session import Session

Array = npt.NDArray[Any]
Range = tuple[int, int]


class Sink:
    """Takes an answer, its elements where they belong.

    Attributes:
        values: the answer; NaN where none came.
    """

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self.values = np.full(size, np.nan, dtype)
        self._unfinished: list[tuple[int, Array]] = []

    def buffer(self, offset: int, count: int) -> Array:
        """See `ReplyWriter`: memory that is aligned to nothing, as in a message."""
        made = np.full(count * self.values.itemsize + 1, 0xFF, np.uint8)[1:].view(self.values.dtype)
        self._unfinished.append((offset, made))
        return made

    def flush(self) -> None:
        """See `ReplyWriter`: what is handed over here is what would be sent."""
        offset, made = self._unfinished.pop(0)
        self.values[offset : offset + len(made)] = made


def make_session(config: SessionConfig, engine: Engine, budget_bytes: int = 1 << 30) -> Session:
    """Make a session whose slot is held with token 1."""
    session = Session("ab" * 16, config, engine, MemoryBudget(budget_bytes), epoch=1, clock=lambda: 0.0)
    session.take_slot()
    return session


def request_of(session: Session, **fields: Any) -> StepRequest:
    """Make the order of the next step, with the plan's own numbers and dtypes."""
    config = session.config
    step = session.ledger.applied_step + 1
    return StepRequest(step, 0, config.gradient_dtype, config.reply_dtype, True, 1 << 20, config.groups)._replace(
        **fields
    )


def stage(session: Session, request: StepRequest, gradient: Array, chunks: Iterable[Range]) -> Any:
    """Begin a step and bring its chunks, as bytes that are aligned to nothing; close what is returned."""
    staging = session.begin(request, 1)
    try:
        for low, high in chunks:
            payload = np.empty((high - low) * gradient.itemsize + 1, np.uint8)[1:]
            payload[:] = gradient[low:high].view(np.uint8)
            staging.add(low, high - low, payload)
            payload[:] = 0xFF if session.device != "cpu" else payload  # a GPU has copied them
    except BaseException:
        staging.close()
        raise
    return staging


def take(
    session: Session, gradient: Array, chunks: Sequence[Range] | None = None, **fields: Any
) -> tuple[StepResult, Array]:
    """Take the next step, or the one that `fields` say; returns the record and the answer."""
    request = request_of(session, **fields)
    sink = Sink(len(gradient), request.reply_dtype)
    with np.errstate(all="ignore"):
        gradient = gradient.astype(request.gradient_dtype)
    staging = stage(session, request, gradient, [(0, len(gradient))] if chunks is None else chunks)
    try:
        return session.commit(request, staging, 1, sink, 0.0), sink.values
    finally:
        staging.close()


def everything(session: Session) -> tuple[Snapshot, dict[str, Array]]:
    """Pull all slots."""
    snapshot, slots = session.snapshot(), {}
    for slot in session.slots:
        slots[slot] = np.empty(session.config.layout.size, np.float32)
        session.read(snapshot, slot, 0, slots[slot])
    return snapshot, slots


def load(session: Session, slots: dict[str, Array], snapshot: Snapshot | None = None) -> None:
    """Load slots; with a snapshot, also how far they are."""
    staged, room = session.stage_load(tuple(slots))
    with room:
        try:
            for slot, values in slots.items():
                staged.write(slot, 0, values)
            number = session.ledger.applied_load + 1
            if snapshot is None:
                assert session.commit_load(staged, tuple(slots), 1, number, None, [])
            else:
                steps = list(snapshot.tensor_steps)
                assert session.commit_load(staged, tuple(slots), 1, number, snapshot.step, steps, snapshot.loss_scale)
        finally:
            staged.close()
