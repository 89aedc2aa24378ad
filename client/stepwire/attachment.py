"""The client's hold on a session's slot: its stream, mended when it breaks, and the steps taken over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np

from stepwire.errors import StepMismatchError, UnavailableError
from stepwire.frames import FrameBuffer
from stepwire.packing import ChunkPlan, Flat, Packer
from stepwire.retry import Deadline
from stepwire.stream import AttachedStream
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import session_pb2, step_pb2, tensor_pb2

__all__ = ["Attachment", "StepCall"]


@dataclasses.dataclass(frozen=True)
class StepCall:
    """One call of `Session.step`, checked and ready to be sent as often as it takes.

    Attributes:
        begin: what opens the step.
        gradients: what is sent, in `gradient_dtype`.
        gradient_dtype: on the wire.
        targets: where the answer goes, in `reply_dtype`.
        reply_dtype: on the wire.
        missing: indices of the tensors without a gradient.
    """

    begin: step_pb2.StepBegin
    gradients: Flat
    gradient_dtype: np.dtype[Any]
    targets: Flat
    reply_dtype: np.dtype[Any]
    missing: frozenset[int] = frozenset()


class Attachment:
    """Holds the slot. The session serialises its calls.

    Attributes:
        token: proves possession of the slot; 0 before it was taken.
        epoch: the session's epoch.
        applied_step: the last step known to be applied.
        applied_load: the last load known to be applied.
        step_on_server: the last step applied on the server, as it said itself.
        in_doubt: since then a step has failed that may have been applied; attaching tells.
    """

    def __init__(
        self, channel: grpc.Channel, session: session_pb2.Session, token: int, packer: Packer, chunk_bytes: int
    ) -> None:
        """Be ready to attach to a session as the server described it."""
        self.token = token
        self.epoch = session.epoch
        self.applied_step = session.applied_step
        self.applied_load = session.applied_load
        self._session_id = session.session_id
        self._channel = channel
        self._packer = packer
        self._chunk_bytes = chunk_bytes
        self._stream: AttachedStream | None = None
        self.step_on_server = session.applied_step
        self.in_doubt = False

    def attach(self, deadline: Deadline) -> AttachedStream:
        """Return the stream, attaching if there is none; without a token that takes the slot.

        Raises:
            FencedError: another client took the slot.
            StepwireError: the server refused or cannot be reached.
        """
        if self._stream is None:
            opening = pb.AttachOpen(session_id=self._session_id, attach_token=self.token, epoch=self.epoch)
            stream = AttachedStream(self._channel, opening, deadline)
            if self.token == 0:
                self.applied_step, self.applied_load = stream.opened.applied_step, stream.opened.applied_load
            self.token = stream.opened.attach_token
            self.step_on_server, self.in_doubt = stream.opened.applied_step, False
            self._stream = stream
        return self._stream

    def detach(self) -> None:
        """Drop the stream, if any; the slot stays ours until another client takes it."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def loaded(self, load: int, applied_step: int) -> None:
        """Note a committed load and the step it left the session at."""
        self.applied_load = load
        self.applied_step = self.step_on_server = applied_step

    def take_step(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Send a step once and read its answer; whatever fails, the stream is dropped.

        Raises:
            StepMismatchError: the session moved without this client.
            StepwireError: the server's refusal, a broken connection, or the deadline.
        """
        try:
            stream = self.attach(deadline)
            result = self._read_answer(stream, call, deadline)
        except BaseException:
            self.detach()
            self.in_doubt = True
            raise
        self.applied_step = self.step_on_server = result.step
        return result

    def _messages(self, call: StepCall) -> Iterator[bytes]:
        """Return what to send: the step, or, where it was applied and only its answer was lost, no gradient."""
        step, applied = call.begin.step, self.step_on_server
        if applied not in (step - 1, step):
            raise StepMismatchError(
                f"this client is about to take step {step} and the session is at step {applied}: it moved without "
                "this client; pull the parameters and go on from there with a new Session object",
                metadata={"expected_step": applied + 1, "actual_step": step},
            )
        chunks = self._packer.chunks(self._chunk_bytes // call.gradient_dtype.itemsize)
        if call.missing:
            chunks = [chunk for chunk in chunks if any(part.tensor not in call.missing for part in chunk.parts)]
        if applied == step or not chunks:
            return iter([pb.AttachRequest(begin=call.begin, commit=step_pb2.StepCommit()).SerializeToString()])
        return self._gradient_messages(chunks, call)

    def _gradient_messages(self, chunks: Sequence[ChunkPlan], call: StepCall) -> Iterator[bytes]:
        """Make the messages of a step as they are asked for; a small step is one."""
        for index, (offset, count, parts) in enumerate(chunks):
            header = pb.AttachRequest(
                begin=call.begin if index == 0 else None,
                chunk=tensor_pb2.Chunk(offset=offset, count=count),
                commit=step_pb2.StepCommit() if index == len(chunks) - 1 else None,
            )
            frame = FrameBuffer(header, count * call.gradient_dtype.itemsize)
            self._packer.write(call.gradients, parts, frame.payload(call.gradient_dtype))
            yield frame.finish()

    def _read_answer(self, stream: AttachedStream, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        missing = self._packer.layout.size
        for frame in stream.exchange(self._messages(call), deadline):
            message: pb.AttachResponse = frame.message
            if message.HasField("chunk"):
                parts = self._packer.parts(message.chunk.offset, message.chunk.count)
                self._packer.read(call.targets, parts, frame.payload.view(call.reply_dtype))
                missing -= message.chunk.count
            if message.HasField("result"):
                break
        if missing:
            raise UnavailableError(f"the answer to step {call.begin.step} lacks {missing} elements")
        result: step_pb2.StepResult = message.result
        return result
