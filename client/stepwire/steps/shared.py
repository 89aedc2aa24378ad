"""Steps over shared memory: the message that stands for a gradient there, and the reply that lies there."""

from __future__ import annotations

from stepwire.arrays.packing import Container
from stepwire.steps.call import StepCall
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2

__all__ = ["can_carry", "read_shared_reply", "shared_message"]


def can_carry(shared: SharedArrays, call: StepCall) -> bool:
    """Tell whether a step can go over shared memory.

    Such a step has the session's own dtypes, and the server applies it, and replies to it, as a whole.
    """
    begin = call.begin
    return (
        call.gradient_dtype == shared.gradient_dtype
        and call.reply_dtype == shared.reply_dtype
        and not begin.overlap
        and begin.reply.mode != step_pb2.REPLY_MODE_CHANGED
        and call.feed is None
        and call.recorded is None
    )


def shared_message(shared: SharedArrays, call: StepCall, *, again: bool) -> bytes:
    """Write the gradient of a step to shared memory, and return the message of the step.

    Args:
        shared: the memory.
        call: the step.
        again: the step was applied, and only its reply was lost; no gradient is written.

    Raises:
        UnavailableError: the device failed.
    """
    if not again:
        if call.feedback is not None:
            call.feedback.discard()
        if call.record is not None:  # of an attempt over another stream
            call.record.clear()
        shared.write(call)
    message = pb.AttachRequest()
    begin = message.begin
    begin.CopyFrom(call.begin)
    begin.in_shared_memory = True
    message.commit.CopyFrom(call.commit)
    return message.SerializeToString()


def read_shared_reply(shared: SharedArrays, call: StepCall) -> None:
    """Read the reply of a step: by a copy, or by views if the user asked for those.

    Raises:
        UnavailableError: the device failed.
    """
    if not call.wants_reply:
        return
    if call.views is not None:
        _fill(call.views, shared)
    else:
        shared.read(call.targets)
    if call.on_tensor is not None:
        first, count = call.begin.reply.first, len(shared.packer.layout.tensors)
        for index in (*first, *(index for index in range(count) if index not in first)):
            call.on_tensor(index)


def _fill(views: Container, shared: SharedArrays) -> None:
    named = shared.parameter_views()
    if isinstance(views, list):
        views[:] = [named[str(position)] for position in range(len(named))]
    else:
        views |= named
