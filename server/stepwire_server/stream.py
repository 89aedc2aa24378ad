"""One attached stream: its frames in order, and the answer to each step.

Small steps are answered in the handler's own thread by a single message. The commit of a large one runs in a
worker that goes to the end whatever becomes of the client, while this thread sends what is ready: the answer's
first chunk is on its way while later ones are computed.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Final

import numpy as np

from stepwire.errors import InvalidRequestError, Reason
from stepwire.frames import Frame, FrameBuffer
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2, tensor_pb2
from stepwire_server.decoding import decode_order
from stepwire_server.encoding import encode_record
from stepwire_server.engines.protocol import HostArray
from stepwire_server.features import unsupported
from stepwire_server.gate import Gate
from stepwire_server.plan import StepOrder
from stepwire_server.progress import StepRecord
from stepwire_server.session import Session
from stepwire_server.slot import Attachment
from stepwire_server.staging import GradientStaging

__all__ = ["StepStream", "check_chunk", "invalid_frame", "step_once"]

# Below this, an answer is computed into a scratch array and copied into one message together with the result.
_SMALL_REPLY_BYTES: Final = 256 << 10


class StepStream:
    """The steps of one attached client."""

    def __init__(
        self,
        session: Session,
        attachment: Attachment,
        gate: Gate,
        workers: Executor,
        clock: Callable[[], float],
        max_chunk_bytes: int,
    ) -> None:
        """Serve steps of `session` to the client that holds `attachment`."""
        self._session = session
        self._attachment = attachment
        self._gate = gate
        self._workers = workers
        self._clock = clock
        self._max_chunk_bytes = max_chunk_bytes
        self._last_settings = b""
        self._last_send_seconds: float | None = None
        self._last_order: StepOrder | None = None

    def answers(self, frames: Iterator[Frame]) -> Iterator[bytes]:
        """Yield the answers to the steps in `frames`, until the client is done.

        Raises:
            StepwireError: whatever is wrong with a step; the stream ends with it.
        """
        # A frame holds megabytes, so none stays in a variable longer than it takes to stage it.
        for opening in map(lambda frame: [frame], frames):
            with self._gate:
                yield from self._step(opening, frames)
                self._attachment.ending = self._gate.closed
            if self._attachment.ending:
                raise self._gate.refusal()

    def _step(self, opening: list[Frame], frames: Iterator[Frame]) -> Iterator[bytes]:
        began = self._seen()
        if not opening[0].message.HasField("begin"):
            raise invalid_frame("begin", "a step starts with `begin`")
        order = self._order(opening[0].message.begin)
        staging = self._session.begin(order, self._attachment.token)
        self._attachment.in_step = True
        try:
            self._receive(opening.pop(), frames, staging)
            yield from self._timed(self._commit(order, staging, began))
        finally:
            self._attachment.in_step = False
            staging.close()

    def _timed(self, answer: Iterator[bytes]) -> Iterator[bytes]:
        """Pass an answer on, and add up the time until each of its messages was taken: gRPC asks for the next then."""
        total = 0.0
        for message in answer:
            handed_over = self._clock()
            yield message
            total += self._seen() - handed_over
        self._last_send_seconds = total

    def _order(self, begin: step_pb2.StepBegin) -> StepOrder:
        """Decode what opens a step; one that differs from the step before in its number alone is that order again."""
        step, begin.step = begin.step, 0
        settings = begin.SerializeToString()
        if self._last_order is None or settings != self._last_settings:
            self._last_order = decode_order(begin, self._session.plan, self._max_chunk_bytes)
            self._last_settings = settings
        return self._last_order._replace(step=step)

    def _receive(self, frame: Frame, frames: Iterator[Frame], staging: GradientStaging) -> None:
        """Take chunks until the commit."""
        while True:
            self._seen()
            self._take_chunk(frame, staging)
            if frame.message.HasField("commit"):
                if frame.message.commit.HasField("clip_coefficient"):
                    raise unsupported("commit.clip_coefficient", "two_phase_clipping")
                return
            if (following := next(frames, None)) is None:
                raise invalid_frame("commit", "the stream ended inside a step, before `commit`")
            frame = following
            if frame.message.HasField("begin"):
                raise invalid_frame("begin", "a second `begin` before the `commit` of the step")

    def _take_chunk(self, frame: Frame, staging: GradientStaging) -> None:
        message: pb.AttachRequest = frame.message
        if message.HasField("open"):
            raise invalid_frame("open", "only the first message of a stream carries `open`")
        if not message.HasField("chunk"):
            if frame.payload.size:
                raise invalid_frame("chunk", f"a payload of {frame.payload.size} bytes comes without `chunk`")
            return
        check_chunk(frame, self._max_chunk_bytes)
        staging.add(message.chunk.offset, message.chunk.count, frame.payload)

    def _commit(self, order: StepOrder, staging: GradientStaging, began: float) -> Iterator[bytes]:
        size = self._session.plan.layout.size
        if not order.reply or size * order.reply_dtype.itemsize <= min(_SMALL_REPLY_BYTES, self._max_chunk_bytes):
            return self._commit_small(order, staging, began)
        return self._commit_large(order, staging, began)

    def _commit_small(self, order: StepOrder, staging: GradientStaging, began: float) -> Iterator[bytes]:
        sink = _ScratchSink(order, self._session.plan.layout.size)
        record = self._session.commit(order, staging, self._attachment.token, sink, began)
        yield sink.message(self._result(record))

    def _commit_large(self, order: StepOrder, staging: GradientStaging, began: float) -> Iterator[bytes]:
        ready: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        sink = _QueueSink(order, ready)

        def commit() -> StepRecord:
            try:
                return self._session.commit(order, staging, self._attachment.token, sink, began)
            finally:
                ready.put(None)

        running = self._workers.submit(commit)
        try:
            while (frame := ready.get()) is not None:
                yield frame
        finally:
            # Also when the client is gone: the step is not over, for draining or for freeing its gradient,
            # before its worker is. Its error is raised below, where somebody listens.
            running.exception()
        yield self._result(running.result()).SerializeToString()

    def _result(self, record: StepRecord) -> pb.AttachResponse:
        response = pb.AttachResponse()
        encode_record(record, self._session.ledger.durable_step, response.result)
        if self._last_send_seconds is not None:
            response.result.telemetry.previous_send_seconds = self._last_send_seconds
        return response

    def _seen(self) -> float:
        self._attachment.last_seen = now = self._clock()
        return now


def step_once(session: Session, frame: Frame, clock: Callable[[], float], max_bytes: int) -> bytes:
    """Take the one step of a `StepRequest` and return its `StepResponse`.

    Raises:
        StepwireError: whatever is wrong with the step.
    """
    began = clock()
    request: pb.StepRequest = frame.message
    order = decode_order(request.begin, session.plan, max_bytes)
    size = session.plan.layout.size
    if max(frame.payload.size, size * order.reply_dtype.itemsize if order.reply else 0) > max_bytes:
        raise invalid_frame(
            "payload",
            f"{size} elements are more than the {max_bytes} bytes of one call; attach a stream instead",
        )
    sink = _ScratchSink(order, size)
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


class _ScratchSink:
    """Takes a small answer whole, so that it can travel in one message with the result."""

    def __init__(self, order: StepOrder, size: int) -> None:
        """Make room for `size` elements, if `order` wants an answer."""
        self._values: HostArray = np.empty(size if order.reply else 0, order.reply_dtype)

    def buffer(self, offset: int, count: int) -> HostArray:
        """See `ReplySink`."""
        return self._values[offset : offset + count]

    def flush(self) -> None:
        """See `ReplySink`."""

    def message(self, header: pb.AttachResponse | pb.StepResponse) -> bytes:
        """Put the answer behind the header's fields."""
        if not self._values.size:
            return header.SerializeToString()
        if isinstance(header, pb.AttachResponse):
            header.chunk.count = self._values.size
        frame = FrameBuffer(header, self._values.nbytes)
        frame.payload(self._values.dtype)[:] = self._values
        return frame.finish()


class _QueueSink:
    """Takes an answer chunk by chunk, each computed straight into its outgoing message."""

    def __init__(self, order: StepOrder, ready: queue.SimpleQueue[bytes | None]) -> None:
        self._order = order
        self._ready = ready
        self._unfinished: deque[FrameBuffer] = deque()

    def buffer(self, offset: int, count: int) -> HostArray:
        header = pb.AttachResponse(chunk=tensor_pb2.Chunk(offset=offset, count=count))
        frame = FrameBuffer(header, count * self._order.reply_dtype.itemsize)
        self._unfinished.append(frame)
        return frame.payload(self._order.reply_dtype)

    def flush(self) -> None:
        self._ready.put(self._unfinished.popleft().finish())


def check_chunk(frame: Frame, max_chunk_bytes: int) -> None:
    """Refuse a chunk that is wrong whatever the space it is for.

    Raises:
        UnsupportedFeatureError: it brings rows.
        InvalidRequestError: it has more bytes than a message may carry.
    """
    if frame.message.chunk.rows:
        raise unsupported("chunk.rows", "sparse_rows")
    if frame.payload.size > max_chunk_bytes:
        raise invalid_frame("payload", f"{frame.payload.size} bytes; a chunk holds at most {max_chunk_bytes}")


def invalid_frame(field: str, problem: str) -> InvalidRequestError:
    """Say what is wrong with a message of a stream."""
    return InvalidRequestError(f"{field}: {problem}", reason=Reason.INVALID_FRAME, metadata={"field": field})
