"""The replies to one sending of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from stepwire.connection.retry import Deadline
from stepwire.connection.stream import Carrier
from stepwire.errors import Reason, StepwireError
from stepwire.steps.call import StepCall
from stepwire.wire.frames import Frame

__all__ = ["replies"]

_REFUSALS: Final = frozenset(
    {
        Reason.FENCED,
        Reason.STALE_EPOCH,
        Reason.STREAM_DISPLACED,
        Reason.NON_FINITE_GRADIENT,
        Reason.INVALID_TENSOR,
        Reason.INVALID_CONFIG,
        Reason.SESSION_MOVED,
        Reason.SESSION_MOVING,
    }
)
"""The reasons that come from a server alone, and mean that it applied nothing of the step."""


def replies(carrier: Carrier, call: StepCall, messages: Iterable[bytes], deadline: Deadline) -> Iterator[Frame]:
    """Send a step, and yield the replies; a step that the server refused has not been sent, as far as it matters."""
    sent, call.sent = call.sent, True
    try:
        yield from carrier.exchange(messages, deadline)
    except StepwireError as refused:
        if refused.reason in _REFUSALS and not call.begin.overlap:
            call.sent = sent
        raise
