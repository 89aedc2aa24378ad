"""One attached stream: its frames in order, and the reply to each step.

Small steps are replied to in the handler's own thread by a single message. The commit of a large one runs in a thread
that goes to the end whatever becomes of the client. Meanwhile the handler's thread sends finished chunks, so the first
chunk of the reply is on its way while later ones are computed.
"""

from __future__ import annotations

import contextlib
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np

from stepwire.errors import InvalidRequestError, Reason
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2, transport_pb2
from stepwire.wire.frames import Frame
from stepwire.wire.trace_context import TraceContext
from stepwire_server.aggregation.uploads import UploadSlot
from stepwire_server.records.replied import Replied
from stepwire_server.records.session_config import SessionConfig
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.rpc.decode_step import decode_decision, decode_step_request, decode_trace, with_base_step
from stepwire_server.rpc.decode_tables import MOST_ROW_BYTES
from stepwire_server.rpc.encode import encode_gradient_check, encode_result
from stepwire_server.rpc.reply_messages import ChunkReplyWriter, WholeReplyWriter
from stepwire_server.rpc.serving import Serving
from stepwire_server.sessions.client_stream import ClientStream
from stepwire_server.sessions.session import Session
from stepwire_server.sessions.workers import Holder
from stepwire_server.sharing.shared_step import MemoryReplyWriter, StreamMemory, stage_shared
from stepwire_server.steps.reply import ReplyPipeline
from stepwire_server.steps.step import Step

__all__ = ["StepStream", "check_chunk", "invalid_frame"]

# Below this, a reply is computed into a scratch array and copied into one message together with the result.
_SMALL_REPLY_BYTES: Final = 256 << 10


_NO_UPLOAD: Final = contextlib.nullcontext(None)
_TOGETHER_BYTES: Final = 16 << 20
_LEAST_CHUNK_BYTES: Final = 64 << 10
"""The bytes of the messages that are on their way to all workers of a session, and of one of them at least."""


class StepStream:
    """The steps of one attached client.

    Attributes:
        last_request: the last step as it was asked for; None before the first.
        last_settings: its opening, without the number.
        last_send_seconds: the time of sending the last reply; None before the first.
    """

    def __init__(
        self,
        session: Session,
        holder: Holder,
        stream: ClientStream,
        serving: Serving,
        memory: StreamMemory | None = None,
    ) -> None:
        """Serve steps of `session` to the client that holds its worker, and perhaps shares memory."""
        self._session = session
        self._holder = holder
        self._stream = stream
        self._serving = serving
        self._shared = memory
        self._epoch = session.ledger.epoch
        self.last_settings = b""
        self.last_send_seconds: float | None = None
        self.last_request: StepRequest | None = None
        self._received_bytes = 0
        self._told: StepResult | None = None
        self._trace: TraceContext | None = None

    def replies(self, frames: Iterator[Frame]) -> Iterator[bytes]:
        """Yield the replies to the steps in `frames`, until the client is done.

        Raises:
            StepwireError: the first step that is refused; the stream ends with it.
        """
        # A frame holds megabytes, so none stays in a variable longer than it takes to stage it.
        for opening in map(lambda frame: [frame], frames):
            yield from self.step(opening, frames)

    def step(self, opening: list[Frame], frames: Iterator[Frame]) -> Iterator[bytes]:
        """Yield the replies to one step: to a list of its first message, which is emptied, and to what follows.

        Raises:
            StepwireError: the step is refused, or the server ends; the stream ends with it.
        """
        with self._serving.drain.admit():
            yield from self._step(opening, frames)
            self._stream.ending = self._serving.drain.started
        if self._stream.ending:
            raise self._serving.drain.refusal()

    def _step(self, opening: list[Frame], frames: Iterator[Frame]) -> Iterator[bytes]:
        began = self._seen()
        if opening[0].message.HasField("check"):
            yield self._check_memory(opening[0])
            return
        if not opening[0].message.HasField("begin"):
            raise invalid_frame("begin", "a step starts with `begin`")
        self._stream.check()
        request = self._decode(opening[0].message.begin)
        with self._upload(opening[0]) as slot, self._session.begin(request, self._holder, began, slot) as step:
            self._stream.in_step = True
            try:
                if request.awaits_admission:
                    yield _admitted(opening[0], step)
                overlaps = request.overlap and not step.replay
                yield from self._timed(step, (self._overlap if overlaps else self._gather)(opening, frames, step))
            finally:
                self._stream.in_step = False

    def _upload(self, opening: Frame) -> contextlib.AbstractContextManager[UploadSlot | None]:
        """Wait for a place among the uploads of several workers; a gradient that is there needs none."""
        contributions = self._session.contributions
        if contributions is None or opening.message.HasField("commit") or opening.message.begin.in_shared_memory:
            return _NO_UPLOAD
        return contributions.upload(self._stream)

    def _timed(self, step: Step, reply: Iterator[bytes]) -> Iterator[bytes]:
        """Pass a reply on, and sum the time until gRPC asks for the message after each: it has taken the one before.

        After the last one it may never ask: a client that has read its reply may detach at once.
        """
        total, sent_bytes = 0.0, 0
        try:
            for message in reply:
                sent_bytes += len(message)
                handed_over = self._serving.clock()
                yield message
                total += self._seen() - handed_over
        finally:
            self.last_send_seconds = total
            if self._serving.reply_sinks and self._told is not None:
                replied = self._replied(step, self._told, sent_bytes, total)
                for sink in self._serving.reply_sinks:
                    sink(replied)

    def _replied(self, step: Step, result: StepResult, sent_bytes: int, send_seconds: float) -> Replied:
        request, size, received_bytes = step.request, self._session.config.layout.size, self._received_bytes
        if request.shared:
            received_bytes = size * request.gradient_dtype.itemsize
            sent_bytes += size * request.reply_dtype.itemsize if request.reply else 0
        seconds = self._stream.last_seen - step.began
        self._received_bytes, self._told = 0, None
        return Replied(
            self._stream.transport,
            result,
            request.gradient_dtype,
            request.reply_dtype,
            received_bytes,
            sent_bytes,
            step.sync_seconds,
            send_seconds,
            seconds,
            self._session.session_id,
            self._trace,
        )

    def _decode(self, begin: step_pb2.StepBegin) -> StepRequest:
        """Decode the opening of a step; one that differs from the step before in its number alone is decoded once."""
        step, begin.step = begin.step, 0
        base = begin.base_step if begin.HasField("base_step") else None
        begin.ClearField("base_step")
        self._trace = decode_trace(begin) if begin.traceparent else None
        settings = begin.SerializeToString()
        if self.last_request is None or settings != self.last_settings:
            config = self._session.config
            request = decode_step_request(begin, config, self._serving.max_chunk_bytes)
            request = request._replace(reply_elements=_elements_together(request, config, self._serving))
            if not request.epoch:  # a stream is opened in an epoch, and never skips its check
                request = request._replace(epoch=self._epoch)
            if request.shared and self._memory().in_place:  # the reply is the state, where the client sees it
                request = request._replace(reply=False)
            if request.shared and self._memory().on_device:  # kernels write it where it is read, in one go
                request = request._replace(reply_elements=max(config.layout.size, 1))
            self.last_request, self.last_settings = request, settings
        request = self.last_request.numbered(step)
        return request if base is None else with_base_step(request, base, self._session.config)

    def _gather(self, opening: list[Frame], frames: Iterator[Frame], step: Step) -> Iterator[bytes]:
        """Receive everything, then apply it and reply."""
        config = self._session.config
        if step.request.shared:
            stage_shared(self._memory(), step, config.layout.size, self._session.depth)
        commit = self._receive(opening.pop(), frames, step)
        step.received = self._stream.last_seen
        if step.gradient.rows is not None and not step.replay:
            step.gradient.rows.complete()  # here nobody waits for the sum of rows that come often
        if config.treatment.two_phase and decode_decision(commit, config) is None:
            check = self._session.check(step)
            if check is not None:
                yield encode_gradient_check(check)
                commit = self._second_half(frames)
        step.decision = decode_decision(commit, config)
        yield from self._commit(step)

    def _overlap(self, opening: list[Frame], frames: Iterator[Frame], step: Step) -> Iterator[bytes]:
        """Apply each chunk as it comes, and reply with it."""
        ready: deque[bytes] = deque()
        frame, ended = opening.pop(), False
        with ReplyPipeline(ChunkReplyWriter(step.request, ready.append), self._session.depth) as reply:
            while not ended:
                ended = self._stage(frame, step)
                if (chunk := step.gradient.pop()) is not None:
                    self._session.apply(step, chunk, reply)
                del frame, chunk
                while ready:
                    yield ready.popleft()
                if not ended:
                    frame = self._following(frames)
        yield from ready
        yield self._result(self._session.finish(step)).SerializeToString()

    def _receive(self, frame: Frame, frames: Iterator[Frame], step: Step) -> step_pb2.StepCommit:
        """Stage chunks until the commit, and return it."""
        while not self._stage(frame, step):
            frame = self._following(frames)
        commit: step_pb2.StepCommit = frame.message.commit
        return commit

    def _stage(self, frame: Frame, step: Step) -> bool:
        """Stage the chunk of a message, if it has one; tell whether it ends the step."""
        message: pb.AttachRequest = frame.message
        if message.HasField("open"):
            raise invalid_frame("open", "only the first message of a stream carries `open`")
        if message.over_stream:
            raise invalid_frame("over_stream", "it comes on a packet lane, as a message of its own")
        ends = message.HasField("commit")
        if not message.HasField("chunk"):
            if frame.payload.size:
                raise invalid_frame("chunk", f"a payload of {frame.payload.size} bytes comes without `chunk`")
            return ends
        if step.request.shared:
            raise invalid_frame("chunk", "a step in shared memory brings no chunks")
        check_chunk(frame, self._serving.max_chunk_bytes)
        self._received_bytes += frame.payload.size
        if message.chunk.rows:
            rows = np.array(message.chunk.rows, np.uint64)
            step.add_rows(message.chunk.offset, message.chunk.count, rows, frame.payload)
        else:
            step.add(message.chunk.offset, message.chunk.count, frame.payload)
        return ends

    def _following(self, frames: Iterator[Frame]) -> Frame:
        if (following := next(frames, None)) is None:
            raise invalid_frame("commit", "the stream ended inside a step, before `commit`")
        self._seen()
        if following.message.HasField("begin"):
            raise invalid_frame("begin", "a second `begin` before the `commit` of the step")
        return following

    def _second_half(self, frames: Iterator[Frame]) -> step_pb2.StepCommit:
        frame = self._following(frames)
        commit: step_pb2.StepCommit = frame.message.commit
        if not frame.message.HasField("commit") or frame.message.HasField("chunk") or frame.payload.size:
            raise invalid_frame("commit", "after `gradient_check` comes a commit alone")
        if decode_decision(commit, self._session.config) is None:
            raise invalid_frame("commit", "the second commit brings `clip_coefficient` (1 for no clipping) or `skip`")
        return commit

    def _commit(self, step: Step) -> Iterable[bytes]:
        if self._session.contributions is None:
            return self._commit_alone(step)
        self._stream.in_step = False  # it waits for other workers, however silent it is
        return self._commit_together(step)

    def _commit_together(self, step: Step) -> Iterable[bytes]:
        """Commit a contribution in this thread, and reply when its round is over."""
        request = step.request
        if request.shared:
            return [self._commit_shared(step)]
        if not request.reply or self._is_small(request):
            return [self._commit_small(step)]
        ready: deque[bytes] = deque()
        result = self._session.commit(step, ChunkReplyWriter(request, ready.append))
        return _drained(ready, lambda: self._result(result).SerializeToString())

    def _is_small(self, request: StepRequest) -> bool:
        if self._session.config.tables:  # rows have chunks of their own
            return False
        reply_bytes = self._session.config.layout.size * request.reply_dtype.itemsize
        serving = self._serving
        return reply_bytes <= min(_SMALL_REPLY_BYTES, serving.max_chunk_bytes, serving.most_reply_bytes)

    def _commit_alone(self, step: Step) -> Iterable[bytes]:
        request = step.request
        if request.shared:
            return [self._commit_shared(step)]
        if not request.reply or self._is_small(request):
            return [self._commit_small(step)]
        return self._commit_large(step)

    def _commit_small(self, step: Step) -> bytes:
        if step.request.reply_base is not None:
            step.request = step.request._replace(reply_base=None)
        writer = WholeReplyWriter(step.request, self._session.config.layout.size)
        result = self._session.commit(step, writer)
        return writer.message(self._result(result))

    def _commit_shared(self, step: Step) -> bytes:
        """Commit in this thread: nothing is sent before all is done, so a client that goes cannot stop it half-way."""
        result = self._session.commit(step, MemoryReplyWriter(self._memory().parameters))
        return self._result(result).SerializeToString()

    def _commit_large(self, step: Step) -> Iterator[bytes]:
        ready: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        writer = ChunkReplyWriter(step.request, ready.put)

        def commit() -> StepResult:
            try:
                return self._session.commit(step, writer)
            finally:
                ready.put(None)

        running = self._serving.commit_threads.submit(commit)
        try:
            while (frame := ready.get()) is not None:
                yield frame
        finally:
            # Also when the client is gone: the step is not over, for draining or for freeing its gradient,
            # before its commit is. Its error is raised below, where somebody listens.
            running.exception()
        yield self._result(running.result()).SerializeToString()

    def _check_memory(self, frame: Frame) -> bytes:
        """Reply to a `check`."""
        fields = [field.name for field, _ in frame.message.ListFields() if field.name not in ("check", "padding")]
        if fields or frame.payload.size or self.last_request is not None:
            raise invalid_frame("check", "memory is checked before the first step, by a message of its own")
        pattern: bytes = frame.message.check.pattern
        if not 16 <= len(pattern) <= 64 or len(pattern) % 4:
            raise invalid_frame("check.pattern", f"{len(pattern)} bytes; it must be 16 to 64, a multiple of 4")
        if (seen := self._memory().check(pattern)) is None:
            raise invalid_frame("check.pattern", "it is not in the memory that this server shares; attach without it")
        return pb.AttachResponse(checked=transport_pb2.MemoryChecked(parameters=seen)).SerializeToString()

    def _memory(self) -> StreamMemory:
        if self._shared is None:
            raise invalid_frame("in_shared_memory", "this stream shares no memory; see `AttachOpened.transport`")
        return self._shared

    def _result(self, result: StepResult) -> pb.AttachResponse:
        response, self._told = pb.AttachResponse(), result
        encode_result(result, self._session.ledger.durable_step, response.result)
        if self.last_send_seconds is not None:
            response.result.telemetry.previous_send_seconds = self.last_send_seconds
        return response

    def _seen(self) -> float:
        self._stream.last_seen = now = self._serving.clock()
        return now


def _admitted(opening: Frame, step: Step) -> bytes:
    """Return the admission of a step whose opening came alone."""
    if opening.message.HasField("chunk") or opening.message.HasField("commit") or opening.payload.size:
        raise invalid_frame("begin", "with `await_admission` it comes alone")
    return pb.AttachResponse(admitted=step_pb2.StepAdmitted(gradient=not step.replay)).SerializeToString()


def _elements_together(request: StepRequest, config: SessionConfig, serving: Serving) -> int:
    """Return the elements of a chunk of a reply. Chunks for several workers have a bound for all of them together."""
    alignment, most = config.layout.chunk_alignment, serving.most_reply_bytes
    if config.aggregation is not None:
        most = min(most, max(_TOGETHER_BYTES // config.aggregation.workers, _LEAST_CHUNK_BYTES))
    return min(request.reply_elements, most // request.reply_dtype.itemsize // alignment * alignment)


def _drained(ready: deque[bytes], last: Callable[[], bytes]) -> Iterator[bytes]:
    while ready:
        yield ready.popleft()
    yield last()


def check_chunk(frame: Frame, max_chunk_bytes: int) -> None:
    """Refuse a chunk that is wrong in any space. A chunk of one row has room for the widest.

    Raises:
        InvalidRequestError: it has more bytes than a message may carry.
    """
    most = max(max_chunk_bytes, MOST_ROW_BYTES) if len(frame.message.chunk.rows) == 1 else max_chunk_bytes
    if frame.payload.size > most:
        raise invalid_frame("payload", f"{frame.payload.size} bytes; a chunk holds at most {most}")


def invalid_frame(field: str, problem: str) -> InvalidRequestError:
    """Return the error of a message of a stream."""
    return InvalidRequestError.of(field, problem, reason=Reason.INVALID_FRAME)
