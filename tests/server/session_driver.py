"""A session driven without a server: steps, pulls and loads as a stream would ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire_server.devices.budget import MemoryBudget
from stepwire_server.devices.pool import Device
from stepwire_server.engines import Engine
from stepwire_server.records.load_request import LoadRequest
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.snapshot import Snapshot
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.workers import Holder
from stepwire_server.steps.step import Step

Array = npt.NDArray[Any]
Range = tuple[int, int]


class RecordingWriter:
    """Keeps a reply, its elements where they belong; a `ReplyWriter`.

    Attributes:
        values: the reply; NaN where none came.
        chunks: the ranges of its chunks, in order.
        flushed: the chunks that are complete.
    """

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self.values = np.full(size, np.nan, dtype)
        self.chunks: list[Range] = []
        self.flushed = 0
        self._unfinished: list[tuple[int, Array]] = []

    def buffer(self, offset: int, count: int) -> Array:
        """See `ReplyWriter`: memory that is aligned to nothing, as in a message."""
        made = np.full(count * self.values.itemsize + 1, 0xFF, np.uint8)[1:].view(self.values.dtype)
        self.chunks.append((offset, offset + count))
        self._unfinished.append((offset, made))
        return made

    def before(self) -> Array:
        """See `ReplyWriter`: no request of these tests has a base."""
        raise AssertionError("a reply without a base")

    def flush(self) -> None:
        """See `ReplyWriter`: the values at this moment are the values that would be sent."""
        offset, made = self._unfinished.pop(0)
        self.values[offset : offset + len(made)] = made
        self.flushed += 1


def make_session(
    config: SessionConfig,
    engine: Engine,
    budget_bytes: int = 1 << 30,
    *,
    budget: MemoryBudget | None = None,
    clock: Callable[[], float] = lambda: 0.0,
    sinks: Sequence[Any] = (),
) -> Session:
    """Make a session whose worker is held."""
    device = Device(engine, budget or MemoryBudget(budget_bytes))
    session = Session("ab" * 16, config, device, epoch=1, clock=clock, sinks=sinks)
    session.acquire()
    return session


def holder_of(session: Session) -> Holder:
    """Return the present holder of the worker."""
    return session.ledger.worker.holder


def request_of(session: Session, **fields: Any) -> StepRequest:
    """Make the request of the next step, with the config's own numbers and dtypes."""
    config = session.config
    step = session.ledger.applied_step + 1
    return StepRequest(step, 0, config.gradient_dtype, config.reply_dtype, True, 1 << 20, config.groups)._replace(
        **fields
    )


def begin(session: Session, request: StepRequest) -> Step:
    """Begin a step under the present hold."""
    return session.begin(request, holder_of(session), 0.0)


def bring(step: Step, gradient: Array, chunks: Iterable[Range], *, reused: bool = False) -> None:
    """Bring a step's chunks, as bytes that are aligned to nothing; `reused` overwrites them after that."""
    for low, high in chunks:
        payload = np.empty((high - low) * gradient.itemsize + 1, np.uint8)[1:]
        payload[:] = gradient[low:high].view(np.uint8)
        step.add(low, high - low, payload)
        if reused:
            payload[:] = 0xFF


def stage(session: Session, request: StepRequest, gradient: Array, chunks: Iterable[Range]) -> Step:
    """Begin a step and bring its chunks; close the step that is returned."""
    step = begin(session, request)
    try:
        bring(step, gradient, chunks, reused=session.device != "cpu")  # a GPU has copied them
    except BaseException:
        step.close()
        raise
    return step


def apply_step(
    session: Session, gradient: Array, chunks: Sequence[Range] | None = None, **fields: Any
) -> tuple[StepResult, Array]:
    """Apply the next step, or the one that `fields` say; returns the result and the reply."""
    request = request_of(session, **fields)
    writer = RecordingWriter(len(gradient), request.reply_dtype)
    with np.errstate(all="ignore"):
        gradient = gradient.astype(request.gradient_dtype)
    with stage(session, request, gradient, [(0, len(gradient))] if chunks is None else chunks) as step:
        return session.commit(step, writer), writer.values


def everything(session: Session) -> tuple[Snapshot, dict[str, Array]]:
    """Pull all slots."""
    snapshot, slots = session.exchange.snapshot(), {}
    for slot in session.slots:
        slots[slot] = np.empty(session.config.layout.size, np.float32)
        session.exchange.read(snapshot, slot, 0, slots[slot])
    return snapshot, slots


def load(session: Session, slots: dict[str, Array], snapshot: Snapshot | None = None) -> bool:
    """Load slots; with a snapshot, its numbers too. False for a replay."""
    request = LoadRequest(session.ledger.applied_load + 1, tuple(slots))
    if snapshot is not None:
        request = request._replace(
            step=snapshot.step,
            tensor_steps=snapshot.tensor_steps,
            loss_scale=snapshot.loss_scale,
            tensor_scalars=snapshot.tensor_scalars,
        )
    return commit_load(session, request, slots)


def commit_load(session: Session, request: LoadRequest, slots: dict[str, Array]) -> bool:
    """Bring the slots of a load, whole, and commit it; False for a replay."""
    with session.exchange.loading(request, holder_of(session)) as staged:
        if staged is None:
            return False
        for slot, values in slots.items():
            staged.add(slot, 0, len(values), values.astype(request.dtype).view(np.uint8))
        staged.complete()
        return session.exchange.commit_load(staged)
