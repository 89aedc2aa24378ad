"""The reply to a step that came over a stream or in a call, as it is told to whoever keeps account of steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stepwire_server.records.step_result import StepResult

__all__ = ["Replied"]


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
