"""The reply to a step that came over a stream or in a call, as it is told to whoever keeps account of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from stepwire.wire.trace_context import TraceContext
from stepwire_server.records.step_result import StepResult

__all__ = ["Replied", "RepliedSink"]


class Replied(NamedTuple):
    """One step that was replied to, a replay included.

    Attributes:
        transport: the way that it came; see `Committed`.
        result: the result that the client was told.
        gradient_dtype: the encoding of the gradient.
        reply_dtype: the encoding of the reply.
        received_bytes: the bytes of the gradient, in messages or in shared memory.
        sent_bytes: the bytes of the reply, with the frames of its messages.
        sync_seconds: the time of waiting for the disk; 0 without a log.
        send_seconds: the time until gRPC had taken the reply; 0 in a call.
        seconds: the time from the first message of the step until then.
        session_id: the session's id.
        trace: the client's place in a trace; None without one.
    """

    transport: str
    result: StepResult
    gradient_dtype: np.dtype[Any]
    reply_dtype: np.dtype[Any]
    received_bytes: int
    sent_bytes: int
    sync_seconds: float
    send_seconds: float
    seconds: float
    session_id: str
    trace: TraceContext | None = None


RepliedSink: TypeAlias = Callable[[Replied], None]
"""Called in the thread that serves the stream or the call, after the reply: must not block and must not fail."""
