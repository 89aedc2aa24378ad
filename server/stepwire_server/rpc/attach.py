"""One attached stream: its frames in order, and the answer to each step.

Small steps are answered in the handler's own thread by a single message. The commit of a large one runs in a
worker that goes to the end whatever becomes of the client, while this thread sends what is ready: the answer's
first chunk is on its way while later ones are computed.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Final

from stepwire.errors import InvalidRequestError, Reason
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2, transport_pb2
from stepwire.wire.frames import Frame
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult
from stepwire_server.rpc.decode_step import decode_decision, decode_step_request
from stepwire_server.rpc.drain import Drain
from stepwire_server.rpc.encode import encode_gradient_check, encode_result
from stepwire_server.rpc.features import unsupported
from stepwire_server.rpc.reply_messages import ChunkReplyWriter, WholeReplyWriter
from stepwire_server.sessions.client_stream import Attachment
from stepwire_server.sessions.session import Session
from stepwire_server.sharing.shared_step import MemoryReplyWriter, StreamMemory, stage_shared
from stepwire_server.steps.gradient import GradientStaging
from stepwire_server.steps.reply import ReplyPipeline

__all__ = ["StepStream", "check_chunk", "invalid_frame"]

# Below this, an answer is computed into a scratch array and copied into one message together with the result.
_SMALL_REPLY_BYTES: Final = 256 << 10


class StepStream:
    """The steps of one attached client."""

    def __init__(
        self,
        session: Session,
        attachment: Attachment,
        drain: Drain,
        workers: Executor,
        clock: Callable[[], float],
        max_chunk_bytes: int,
        shared: StreamMemory | None = None,
    ) -> None:
        """Serve steps of `session` to the client that holds `attachment`, and perhaps shares memory."""
        self._session = session
        self._attachment = attachment
        self._drain = drain
        self._workers = workers
        self._clock = clock
        self._max_chunk_bytes = max_chunk_bytes
        self._shared = shared
        self._last_settings = b""
        self._last_send_seconds: float | None = None
        self._last_request: StepRequest | None = None

    def answers(self, frames: Iterator[Frame]) -> Iterator[bytes]:
        """Yield the answers to the steps in `frames`, until the client is done.

        Raises:
            StepwireError: whatever is wrong with a step; the stream ends with it.
        """
        # A frame holds megabytes, so none stays in a variable longer than it takes to stage it.
        for opening in map(lambda frame: [frame], frames):
            with self._drain.admit():
                yield from self._step(opening, frames)
                self._attachment.ending = self._drain.started
            if self._attachment.ending:
                raise self._drain.refusal()

    def _step(self, opening: list[Frame], frames: Iterator[Frame]) -> Iterator[bytes]:
        began = self._seen()
        if opening[0].message.HasField("check"):
            yield self._check_memory(opening[0])
            return
        if not opening[0].message.HasField("begin"):
            raise invalid_frame("begin", "a step starts with `begin`")
        request = self._request(opening[0].message.begin)
        staging = self._session.begin(request, self._attachment.token)
        self._attachment.in_step = True
        try:
            if request.overlap and not staging.replay:
                answer = self._overlap(opening, frames, request, staging, began)
            else:
                answer = self._gather(opening, frames, request, staging, began)
            yield from self._timed(answer)
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

    def _request(self, begin: step_pb2.StepBegin) -> StepRequest:
        """Decode what opens a step; one that differs from the step before in its number alone is that order again."""
        step, begin.step = begin.step, 0
        settings = begin.SerializeToString()
        if self._last_request is None or settings != self._last_settings:
            request = decode_step_request(begin, self._session.config, self._max_chunk_bytes)
            if request.shared and self._memory().in_place:  # the answer is the state, where the client sees it
                request = request._replace(reply=False)
            if request.shared and self._memory().on_device:  # kernels write it where it is read, in one go
                request = request._replace(reply_elements=max(self._session.config.layout.size, 1))
            self._last_request, self._last_settings = request, settings
        return self._last_request.numbered(step)

    def _gather(
        self,
        opening: list[Frame],
        frames: Iterator[Frame],
        request: StepRequest,
        staging: GradientStaging,
        began: float,
    ) -> Iterator[bytes]:
        """Take everything, then apply and answer it."""
        if request.shared:
            stage_shared(self._memory(), staging, self._session.config.layout.size, self._session.depth)
        commit = self._receive(opening.pop(), frames, staging)
        if self._session.config.treatment.two_phase and decode_decision(commit, self._session.config) is None:
            verdict = self._session.stage(request, staging, self._attachment.token)
            if verdict is not None:
                yield encode_gradient_check(verdict, staging.non_finite_count)
                commit = self._second_half(frames)
        if (decision := decode_decision(commit, self._session.config)) is not None:
            request = request._replace(decision=decision)
        yield from self._commit(request, staging, began)

    def _overlap(
        self,
        opening: list[Frame],
        frames: Iterator[Frame],
        request: StepRequest,
        staging: GradientStaging,
        began: float,
    ) -> Iterator[bytes]:
        """Apply and answer each chunk as it comes."""
        ready: deque[bytes] = deque()
        sink = ChunkReplyWriter(request, ready.append)
        frame, ended = opening.pop(), False
        with ReplyPipeline(sink, self._session.depth) as answer:
            while not ended:
                ended = self._take(frame, staging)
                if (chunk := staging.take()) is not None:
                    self._session.apply(request, chunk, self._attachment.token, sink, answer)
                del frame, chunk
                while ready:
                    yield ready.popleft()
                if not ended:
                    frame = self._following(frames)
        yield from ready
        record = self._session.finish(request, staging, self._attachment.token, began)
        yield self._result(record).SerializeToString()

    def _receive(self, frame: Frame, frames: Iterator[Frame], staging: GradientStaging) -> step_pb2.StepCommit:
        """Take chunks until the commit, and return it."""
        while not self._take(frame, staging):
            frame = self._following(frames)
        commit: step_pb2.StepCommit = frame.message.commit
        return commit

    def _take(self, frame: Frame, staging: GradientStaging) -> bool:
        """Take the chunk of a message, if it has one; tell whether it ends the step."""
        self._take_chunk(frame, staging)
        ends: bool = frame.message.HasField("commit")
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
            raise invalid_frame("commit", "after `staged` comes a commit alone")
        if decode_decision(commit, self._session.config) is None:
            raise invalid_frame("commit", "the second commit brings `clip_coefficient` (1 for no clipping) or `skip`")
        return commit

    def _take_chunk(self, frame: Frame, staging: GradientStaging) -> None:
        message: pb.AttachRequest = frame.message
        if message.HasField("open"):
            raise invalid_frame("open", "only the first message of a stream carries `open`")
        if not message.HasField("chunk"):
            if frame.payload.size:
                raise invalid_frame("chunk", f"a payload of {frame.payload.size} bytes comes without `chunk`")
            return
        if staging.request.shared:
            raise invalid_frame("chunk", "a step in shared memory brings no chunks")
        check_chunk(frame, self._max_chunk_bytes)
        chunk = message.chunk
        staging.add(chunk.offset, chunk.count, frame.payload)

    def _commit(self, request: StepRequest, staging: GradientStaging, began: float) -> Iterable[bytes]:
        size = self._session.config.layout.size
        if request.shared:
            return [self._commit_shared(request, staging, began)]
        if not request.reply or size * request.reply_dtype.itemsize <= min(_SMALL_REPLY_BYTES, self._max_chunk_bytes):
            return [self._commit_small(request, staging, began)]
        return self._commit_large(request, staging, began)

    def _commit_small(self, request: StepRequest, staging: GradientStaging, began: float) -> bytes:
        if request.reply_base is not None:
            request = request._replace(reply_base=None)
        sink = WholeReplyWriter(request, self._session.config.layout.size)
        record = self._session.commit(request, staging, self._attachment.token, sink, began)
        return sink.message(self._result(record))

    def _commit_shared(self, request: StepRequest, staging: GradientStaging, began: float) -> bytes:
        """Commit in this thread: nothing is sent before all is done, so a client that goes cannot stop it half-way."""
        sink = MemoryReplyWriter(self._memory().parameters)
        record = self._session.commit(request, staging, self._attachment.token, sink, began)
        return self._result(record).SerializeToString()

    def _check_memory(self, frame: Frame) -> bytes:
        """Answer a `check`."""
        fields = [field.name for field, _ in frame.message.ListFields() if field.name not in ("check", "padding")]
        if fields or frame.payload.size or self._last_request is not None:
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

    def _commit_large(self, request: StepRequest, staging: GradientStaging, began: float) -> Iterator[bytes]:
        ready: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        sink = ChunkReplyWriter(request, ready.put)

        def commit() -> StepResult:
            try:
                return self._session.commit(request, staging, self._attachment.token, sink, began)
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

    def _result(self, record: StepResult) -> pb.AttachResponse:
        response = pb.AttachResponse()
        encode_result(record, self._session.ledger.durable_step, response.result)
        if self._last_send_seconds is not None:
            response.result.telemetry.previous_send_seconds = self._last_send_seconds
        return response

    def _seen(self) -> float:
        self._attachment.last_seen = now = self._clock()
        return now


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
