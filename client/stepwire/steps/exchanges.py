"""The message and the reply of a direct step: those of a call that was built, or of a step like those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np

from stepwire.steps.call import StepCall, fits_in_packets
from stepwire.steps.description import SessionDescription
from stepwire.steps.shared import can_carry, read_shared_reply, shared_message
from stepwire.transports.packets import PacketLane
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire.wire.dtypes import FLOAT16, INT8
from stepwire.wire.packets import REQUEST_BYTES

__all__ = ["CallExchange", "Remember", "StepExchange"]

_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)

Remember = Callable[[float, step_pb2.StepResult], object]
"""Is told of a step that was made, with the time of its begin, of `time.perf_counter`."""


class StepExchange(Protocol[_T_co]):
    """One step on a packet lane: its message, and its reply.

    Attributes:
        lane: the lane that its message is sent on; None before.
    """

    lane: PacketLane | None

    def message(self, step: int, epoch: int, load: int) -> bytes | None:
        """Give the step its numbers, and return its only message; None if it needs something else than that."""

    def prepare(self) -> None:
        """Make the arrays of the reply, while the server is at work."""

    def read(self, reply: pb.AttachResponse) -> bool:
        """Read a reply into its places; False, with nothing read, if it is no whole one."""

    def call(self) -> StepCall:
        """Return the call of the step, the same one each time, to go on with over any stream."""

    def delivered(self, result: step_pb2.StepResult) -> _T_co:
        """Remember the step, whose reply is in its places, and return what its caller gets."""


class CallExchange(Generic[_T]):
    """The exchange of a call that was built."""

    __slots__ = ("_began", "_call", "_chunk_bytes", "_made", "_packer", "_remember", "_shared", "lane")

    def __init__(
        self,
        call: StepCall,
        made: Callable[[], _T],
        description: SessionDescription,
        shared: SharedArrays | None,
        remember: Remember,
        began: float,
    ) -> None:
        """Have nothing sent yet.

        Args:
            call: the call.
            made: makes what the caller gets, once the reply is in its places.
            description: the session.
            shared: the memory that the stream shares; None without one.
            remember: is told of the step.
            began: the time of the step's begin.
        """
        self.lane: PacketLane | None = None
        self._call, self._made = call, made
        self._packer, self._chunk_bytes = description.packer, description.chunk_bytes
        self._shared = shared if shared is not None and can_carry(shared, call) else None
        self._remember, self._began = remember, began

    def message(self, step: int, epoch: int, load: int) -> bytes | None:
        """See `StepExchange.message`."""
        call, begin = self._call, self._call.begin
        unusual = call.feedback or call.patched is not None or call.on_tensor or call.on_device or call.decide
        if unusual or call.feed or begin.overlap or call.gradient_dtype in (FLOAT16, INT8):
            return None
        begin.step, begin.epoch, begin.load = step, epoch, load
        if self._shared is not None:
            return shared_message(self._shared, call, again=False)
        if not fits_in_packets(call, self._packer.layout.size):
            return None
        messages = list(call.messages(self._packer, self._chunk_bytes, again=False))
        return messages[0] if len(messages) == 1 and len(messages[0]) <= REQUEST_BYTES else None

    def prepare(self) -> None:
        """See `StepExchange.prepare`."""
        if self._call.views is None:
            self._call.prepare()

    def read(self, reply: pb.AttachResponse) -> bool:
        """See `StepExchange.read`."""
        call, packer = self._call, self._packer
        if self._shared is not None:
            read_shared_reply(self._shared, call)
        elif call.wants_reply:
            if reply.chunk.count != packer.layout.size:
                return False
            whole = packer.ranges(0, packer.layout.size)
            packer.read(call.targets, whole, np.frombuffer(reply.payload, call.reply_dtype))
        return True

    def call(self) -> StepCall:
        """See `StepExchange.call`."""
        self._call.lane = self.lane
        return self._call

    def delivered(self, result: step_pb2.StepResult) -> _T:
        """See `StepExchange.delivered`."""
        self._remember(self._began, result)
        return self._made()
