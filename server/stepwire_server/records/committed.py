"""The effect of a commit, as it is told to whoever keeps account of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from stepwire_server.records.round_result import RoundResult
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult

__all__ = ["CommitSink", "Committed"]


class Committed(NamedTuple):
    """One committed step. A replay commits nothing and is not told.

    Attributes:
        session_id: the session's id.
        worker: the worker that brought the gradient.
        load: the last committed load of the state that was stepped.
        request: the step as it was asked for.
        result: the step's result, with its norms and times.
        transport: the way that the gradient came: "tcp", "uds", "shm", "packets", "cuda_ipc", or "unary" for a call.
        parts: for each worker whose gradient is in it, its part; empty without aggregation.
    """

    session_id: str
    worker: int
    load: int
    request: StepRequest
    result: StepResult
    transport: str = "unary"
    parts: Sequence[tuple[int, RoundResult]] = ()


CommitSink: TypeAlias = Callable[[Committed], None]
"""Called under the session's lock, in the order of the commits: must not block and must not fail."""
