"""One step of a small session in one call."""

from __future__ import annotations

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.frames import Frame
from stepwire_server.records.replied import Replied
from stepwire_server.records.step_request import StepRequest
from stepwire_server.rpc.attach import invalid_frame
from stepwire_server.rpc.decode_step import DEFAULT_REPLY_BYTES, decode_step_request, decode_trace
from stepwire_server.rpc.encode import encode_result
from stepwire_server.rpc.reply_messages import WholeReplyWriter
from stepwire_server.rpc.serving import Serving
from stepwire_server.sessions.session import Session

__all__ = ["step_once"]


def step_once(session: Session, frame: Frame, serving: Serving) -> bytes:
    """Apply the one step of a `StepRequest` and return its `StepResponse`.

    Raises:
        StepwireError: the step is refused.
    """
    began = serving.clock()
    message: pb.StepRequest = frame.message
    trace = decode_trace(message.begin) if message.begin.traceparent else None
    request, size = _checked_request(session, frame, serving), session.config.layout.size
    writer = WholeReplyWriter(request, size)
    with session.begin(request, session.holder_of(message.attach_token, message.worker), began) as step:
        if size or frame.payload.size:
            step.add(0, size, frame.payload)
        step.received = serving.clock()
        result = session.commit(step, writer)
    response = pb.StepResponse()
    encode_result(result, session.ledger.durable_step, response.result)
    reply = writer.message(response)
    if serving.reply_sinks:
        replied = Replied(
            "unary",
            result,
            request.gradient_dtype,
            request.reply_dtype,
            frame.payload.size,
            len(reply),
            step.sync_seconds,
            0.0,
            serving.clock() - began,
            session.session_id,
            trace,
        )
        for sink in serving.reply_sinks:
            sink(replied)
    return reply


def _checked_request(session: Session, frame: Frame, serving: Serving) -> StepRequest:
    """Return what a call asks for.

    Raises:
        StepwireError: it is nothing for a call.
    """
    begin, most = frame.message.begin, min(serving.max_chunk_bytes, DEFAULT_REPLY_BYTES)
    if begin.await_admission:
        raise invalid_frame("begin.await_admission", "a call brings everything at once; leave it out")
    if session.config.treatment.two_phase:
        raise invalid_frame("begin", "a session with `two_phase` commits in two messages; attach a stream instead")
    if session.config.tables:
        raise invalid_frame("begin", "a session with tables takes rows in messages; attach a stream instead")
    request = decode_step_request(begin, session.config, most)._replace(overlap=False, reply_base=None)
    if request.shared:
        raise invalid_frame("begin.in_shared_memory", "a call shares no memory; attach a stream instead")
    size = session.config.layout.size
    if max(frame.payload.size, size * request.reply_dtype.itemsize if request.reply else 0) > most:
        raise invalid_frame(
            "payload",
            f"{size} elements are more than the {most} bytes of one call; attach a stream instead",
        )
    return request
