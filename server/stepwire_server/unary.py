"""One step of a small session in one call."""

from __future__ import annotations

from collections.abc import Callable

from stepwire.frames import Frame
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire_server.encoding import encode_record
from stepwire_server.order_decoding import decode_order
from stepwire_server.session import Session
from stepwire_server.sinks import WholeSink
from stepwire_server.stream import invalid_frame

__all__ = ["step_once"]


def step_once(session: Session, frame: Frame, clock: Callable[[], float], max_bytes: int) -> bytes:
    """Take the one step of a `StepRequest` and return its `StepResponse`.

    Raises:
        StepwireError: whatever is wrong with the step.
    """
    began = clock()
    request: pb.StepRequest = frame.message
    if session.plan.treatment.two_phase:
        raise invalid_frame("begin", "a session with `two_phase` commits in two messages; attach a stream instead")
    order = decode_order(request.begin, session.plan, max_bytes)._replace(overlap=False, reply_base=None)
    if order.shared:
        raise invalid_frame("begin.in_shared_memory", "a call shares no memory; attach a stream instead")
    size = session.plan.layout.size
    if max(frame.payload.size, size * order.reply_dtype.itemsize if order.reply else 0) > max_bytes:
        raise invalid_frame(
            "payload",
            f"{size} elements are more than the {max_bytes} bytes of one call; attach a stream instead",
        )
    sink = WholeSink(order, size)
    staging = session.begin(order, request.attach_token)
    try:
        if size or frame.payload.size:
            staging.add(0, size, frame.payload)
        record = session.commit(order, staging, request.attach_token, sink, began)
    finally:
        staging.close()
    response = pb.StepResponse()
    encode_record(record, session.ledger.durable_step, response.result)
    return sink.message(response)
