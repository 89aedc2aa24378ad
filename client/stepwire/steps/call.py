"""One call of `Session.step`, checked and ready to be sent any number of times."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwire.arrays.error_feedback import ErrorFeedback, PendingResidual
from stepwire.arrays.packing import ChunkLayout, Container, Flat, Packer
from stepwire.arrays.ranges import Ranges
from stepwire.arrays.rows import RowGradient, RowPart, RowTarget, row_parts
from stepwire.steps.gradient_feed import GradientFeed
from stepwire.steps.trace import StepTrace
from stepwire.transports.cuda.stand_ins import StandIn
from stepwire.transports.packets import PacketLane
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire.wire.dtypes import elements_within, wire_bytes, wire_items
from stepwire.wire.frames import FrameBuffer, read_frame, whole_message
from stepwire.wire.packets import PAYLOAD_BYTES

__all__ = ["Decide", "OnTensor", "StepCall", "fits_in_packets"]

Decide: TypeAlias = Callable[[step_pb2.GradientCheck], step_pb2.StepCommit]
"""Turns the first half of a two-phase commit into the second; may wait for others, and raises to give the step up."""

OnTensor: TypeAlias = Callable[[int], None]
"""Gets the index, in layout order, of a tensor whose new parameters have all arrived."""


@dataclasses.dataclass(slots=True)
class StepCall:
    """The gradient and the options of one step, and the places of its reply.

    Attributes:
        begin: the opening of the step.
        gradients: the gradient, 1-D arrays in layout order, sent in `gradient_dtype`.
        gradient_dtype: the encoding of the gradient on the wire.
        targets: the arrays for the reply, in layout order.
        reply_dtype: the encoding of the reply on the wire.
        missing: the indices of the tensors without a gradient.
        feedback: the error feedback of the encoding; None without one.
        views: a container that shared memory fills with views of itself instead of writing to `targets`.
        patched: the parameters that patches change, `(size,)` in `reply_dtype`; None for whole replies.
        on_tensor: the function to call for each tensor as it arrives, again if the reply is repeated.
        decide: the function that decides the second half of a two-phase commit.
        feed: the feed of a gradient that is still being made; it fills `gradients`.
        rows: the gradients of tables, which have empty arrays in `gradients`.
        row_targets: the places of the rows that come back.
        on_device: by index, the gradients that lie in memory of a device; see `bring`.
        commit: the end of the step. A decision is kept here, so that a repetition brings it at once.
        recognised: the mark of gradients that came before; see `RecognisedArrays`. None for others.
        record: the messages of the step, as they are sent, for a replay window; None to keep none.
        recorded: the messages of a step that is sent again from a replay window; None for any other step.
        trace: the trace of the step; None without one.
        begun: its opening was sent alone, so the messages have none.
        lane: the packet lane that it is under way on, so that its reply alone is missing there; None for none.
        sent: the step was sent before, by this call or by one with the same gradient and options, and not refused. Only
            then may the server's last step be the step of this call.
    """

    begin: step_pb2.StepBegin
    gradients: Flat
    gradient_dtype: np.dtype[Any]
    targets: Flat
    reply_dtype: np.dtype[Any]
    missing: frozenset[int] = frozenset()
    feedback: ErrorFeedback | None = None
    views: Container | None = None
    patched: np.ndarray[Any, Any] | None = None
    on_tensor: OnTensor | None = None
    decide: Decide | None = None
    feed: GradientFeed | None = None
    rows: tuple[RowGradient, ...] = ()
    row_targets: tuple[RowTarget, ...] = ()
    on_device: Mapping[int, StandIn] = dataclasses.field(default_factory=dict)
    commit: step_pb2.StepCommit = dataclasses.field(default_factory=step_pb2.StepCommit)
    recognised: object | None = None
    record: list[bytes] | None = None
    recorded: Sequence[bytes] | None = None
    sent: bool = False
    begun: bool = False
    lane: PacketLane | None = None
    trace: StepTrace | None = None

    @property
    def wants_reply(self) -> bool:
        """Tell whether parameters come back."""
        return self.begin.reply.mode != step_pb2.REPLY_MODE_NONE

    def prepare(self) -> None:
        """Make the arrays of the reply. Before this one thread may ask for them, and after it any number."""
        if type(targets := self.targets) is Ranges:
            targets.made()

    def messages(self, packer: Packer, chunk_bytes: int, *, again: bool) -> Iterable[bytes]:
        """Return the messages of the step: a list of the only one, or an iterator that makes each when it is asked for.

        Args:
            packer: the packer of the session.
            chunk_bytes: the largest payload of a message.
            again: the step was applied, and only its reply was lost; no gradient is sent.

        Raises:
            GivenUp: the step was given up.
            UnavailableError: the device failed.
        """
        if self.recorded is not None and not again:
            return self._again(self.recorded)
        messages = self._made(packer, chunk_bytes, again=again)
        if self.record is None or again:
            return messages
        recording = self._recording(messages, self.record)
        return list(recording) if isinstance(messages, list) else recording

    def _again(self, recorded: Sequence[bytes]) -> Iterator[bytes]:
        """Yield the messages of an earlier sending, with the opening of this one."""
        frame = read_frame(pb.AttachRequest, recorded[0])
        frame.message.begin.CopyFrom(self.begin)
        frame.message.ClearField("payload")
        yield whole_message(frame.message, frame.payload)
        yield from recorded[1:]

    def _recording(self, messages: Iterable[bytes], record: list[bytes]) -> Iterator[bytes]:
        record.clear()
        for message in messages:
            record.append(message)
            yield message

    def _made(self, packer: Packer, chunk_bytes: int, *, again: bool) -> Iterable[bytes]:
        if self.feed is not None:
            self.feed.check()
        if not again:
            self.bring()
        residual = self.feedback.begin() if self.feedback is not None and not again else None
        chunks: list[ChunkLayout | RowPart] = [] if again else list(self._chunks(packer, chunk_bytes))
        chunks += row_parts(self.rows, self.gradient_dtype, chunk_bytes)  # which name the rows of the reply, too
        if not chunks and self.feed is None:
            begin = None if self.begun else self.begin
            return [pb.AttachRequest(begin=begin, commit=self.commit).SerializeToString()]
        if self.feed is not None:
            return self._fed_messages(packer, self._chunks(packer, chunk_bytes), self.feed, residual)
        messages = self._gradient_messages(packer, chunks, residual)
        # A single message cannot be sent while it is packed: then this thread packs it, whose caches are warm.
        return messages if len(chunks) > 1 else list(messages)

    def bring(self, but: Collection[int] = ()) -> None:
        """Copy gradients from a device to the host, into `gradients`; all but some, by index.

        Raises:
            UnavailableError: the device failed.
        """
        for index, stand_in in self.on_device.items():
            if index not in but:
                stand_in.fill()

    def decided(self, check: step_pb2.GradientCheck) -> bytes:
        """Return the message that ends the step, decided from the server's check of the gradient.

        Raises:
            StepwireError: the step is given up.
        """
        if self.decide is not None:
            self.commit.CopyFrom(self.decide(check))
        return pb.AttachRequest(commit=self.commit).SerializeToString()

    def _chunks(self, packer: Packer, chunk_bytes: int) -> Sequence[ChunkLayout]:
        """Return the chunks in the order of sending: in flat order, or in the order of the reply with `overlap`."""
        most = elements_within(self.gradient_dtype, chunk_bytes)
        chunks = packer.chunks(most, self.gradient_dtype, tables=False)
        if self.missing:
            chunks = [chunk for chunk in chunks if any(packed.tensor not in self.missing for packed in chunk.ranges)]
        if self.begin.overlap and self.begin.reply.first:
            ranks = {tensor: rank for rank, tensor in enumerate(self.begin.reply.first)}
            last = len(ranks)
            chunks = sorted(chunks, key=lambda chunk: min(ranks.get(packed.tensor, last) for packed in chunk.ranges))
        return chunks

    def _gradient_messages(
        self, packer: Packer, chunks: Sequence[ChunkLayout | RowPart], residual: PendingResidual | None
    ) -> Iterator[bytes]:
        """Make the messages of a step on demand; a small step is one message."""
        for index, chunk in enumerate(chunks):
            frame = self._frame(chunk, begins=index == 0, ends=index == len(chunks) - 1)
            if isinstance(chunk, RowPart):
                chunk.write(frame.payload(self.gradient_dtype))
            else:
                self._write(packer, chunk, frame, residual)
            yield frame.finish()

    def _fed_messages(
        self, packer: Packer, chunks: Sequence[ChunkLayout], feed: GradientFeed, residual: PendingResidual | None
    ) -> Iterator[bytes]:
        """Make the messages of a step from its feed; the commit is a message of its own."""
        self.gradients = flat = list(self.gradients)
        begun = False
        feed.open(functools.partial(self._encoded, packer))
        for chunk in feed.chunks(chunks, flat):
            frame = self._frame(chunk, begins=not begun, ends=False)
            feed.packed(chunk, functools.partial(self._write, packer, chunk, frame, residual))
            yield frame.finish()
            begun = True
        if feed.committed():
            end = pb.AttachRequest(commit=self.commit)
            if not (begun or self.begun):
                end.begin.CopyFrom(self.begin)
            yield end.SerializeToString()

    def _frame(self, chunk: ChunkLayout | RowPart, *, begins: bool, ends: bool) -> FrameBuffer:
        """Return a message of the gradient without its payload."""
        header = pb.AttachRequest()
        if isinstance(chunk, RowPart):
            chunk.describe(header.chunk)
        else:
            header.chunk.offset, header.chunk.count = chunk.offset, chunk.elements
        if begins and not self.begun:
            header.begin.CopyFrom(self.begin)
        if ends:
            header.commit.CopyFrom(self.commit)
        return FrameBuffer(header, wire_bytes(self.gradient_dtype, chunk.elements))

    def _write(
        self, packer: Packer, chunk: ChunkLayout, frame: FrameBuffer, residual: PendingResidual | None
    ) -> npt.NDArray[Any]:
        """Encode a chunk into its message, and return the payload."""
        payload = frame.payload(self.gradient_dtype)
        packer.write(self.gradients, chunk.ranges, payload, chunk.offset, residual)
        return payload

    def _encoded(self, packer: Packer, chunk: ChunkLayout) -> npt.NDArray[Any]:
        """Return the payload that a chunk of the present gradient would have."""
        payload = np.empty(wire_items(self.gradient_dtype, chunk.elements), self.gradient_dtype)
        packer.write(self.gradients, chunk.ranges, payload, chunk.offset)
        return payload


def fits_in_packets(call: StepCall, size: int) -> bool:
    """Tell whether the payloads of a step of `size` elements fit into one packet each way, and are all there."""
    sent, received = wire_bytes(call.gradient_dtype, size), call.reply_dtype.itemsize * size if call.wants_reply else 0
    return call.feed is None and call.recorded is None and max(sent, received) <= PAYLOAD_BYTES
