"""One call of `Session.step`, checked and ready to be sent as often as it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from stepwire.arrays.error_feedback import ErrorFeedback
from stepwire.arrays.on_device import StandIn
from stepwire.arrays.packing import ChunkLayout, Container, Flat, Packer
from stepwire.steps.gradient_feed import GradientFeed
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire.wire.dtypes import elements_within, wire_bytes
from stepwire.wire.frames import FrameBuffer

__all__ = ["Decide", "OnTensor", "StepCall"]

Decide: TypeAlias = Callable[[step_pb2.GradientCheck], step_pb2.StepCommit]
"""Turns the first half of a two-phase commit into the second; may wait for others, and raises to give the step up."""

OnTensor: TypeAlias = Callable[[int], None]
"""Told the index, in layout order, of a tensor whose new parameters have all arrived."""


@dataclasses.dataclass(slots=True)
class StepCall:
    """What a step sends, and where its answer goes.

    Attributes:
        begin: what opens the step.
        gradients: what is sent, in `gradient_dtype`.
        gradient_dtype: on the wire.
        targets: where the answer goes, in `reply_dtype`.
        reply_dtype: on the wire.
        missing: indices of the tensors without a gradient.
        feedback: what an encoding took off is kept here; None for nowhere.
        views: a container of our own that shared memory fills with views of itself instead of writing to `targets`.
        held: the parameters that patches change, `(size,)` in `reply_dtype`; None where whole answers come.
        on_tensor: told of tensors as they arrive, perhaps again where the step is repeated.
        decide: in a session with two phases, what the second half is.
        feed: where gradients come from that are made while the step is sent; `gradients` is filled from it.
        on_device: by index, the gradients that lie in memory of a device; see `bring`.
        commit: what ends the step. The second half is kept here, so that a repetition brings it at once.
    """

    begin: step_pb2.StepBegin
    gradients: Flat
    gradient_dtype: np.dtype[Any]
    targets: Flat
    reply_dtype: np.dtype[Any]
    missing: frozenset[int] = frozenset()
    feedback: ErrorFeedback | None = None
    views: Container | None = None
    held: np.ndarray[Any, Any] | None = None
    on_tensor: OnTensor | None = None
    decide: Decide | None = None
    feed: GradientFeed | None = None
    on_device: Mapping[int, StandIn] = dataclasses.field(default_factory=dict)
    commit: step_pb2.StepCommit = dataclasses.field(default_factory=step_pb2.StepCommit)

    @property
    def wants_answer(self) -> bool:
        """Parameters come back."""
        return self.begin.reply.mode != step_pb2.REPLY_MODE_NONE

    def messages(self, packer: Packer, chunk_bytes: int, *, again: bool) -> Iterator[bytes]:
        """Return what to send; nothing but the frame of the step where it was applied and only its answer was lost."""
        if self.feed is not None:
            self.feed.check()
        if not again:
            self.bring()
        if self.feedback is not None and not again:
            self.feedback.discard()
        chunks = [] if again else self._chunks(packer, chunk_bytes)
        if not chunks and self.feed is None:
            return iter([pb.AttachRequest(begin=self.begin, commit=self.commit).SerializeToString()])
        if self.feed is not None:
            return self._fed_messages(packer, chunks, self.feed)
        messages = self._gradient_messages(packer, chunks)
        # What is one message cannot be sent while it is packed: then this thread packs it, whose caches are warm.
        return messages if len(chunks) > 1 else iter(list(messages))

    def bring(self, but: Collection[int] = ()) -> None:
        """Bring gradients that lie on a device to the host, `gradients` having room for them; all but some, by index.

        Raises:
            UnavailableError: the device failed.
        """
        for index, stand_in in self.on_device.items():
            if index not in but:
                stand_in.fill()

    def decided(self, staged: step_pb2.GradientCheck) -> bytes:
        """Return the message that ends the step, from what the server has of it.

        Raises:
            StepwireError: the step is given up.
        """
        if self.decide is not None:
            self.commit.CopyFrom(self.decide(staged))
        return pb.AttachRequest(commit=self.commit).SerializeToString()

    def _chunks(self, packer: Packer, chunk_bytes: int) -> Sequence[ChunkLayout]:
        """Return the chunks in the order in which they are sent: as they lie, or what is answered first first."""
        chunks = packer.chunks(elements_within(self.gradient_dtype, chunk_bytes), self.gradient_dtype)
        if self.missing:
            chunks = [chunk for chunk in chunks if any(packed.tensor not in self.missing for packed in chunk.ranges)]
        if self.begin.overlap and self.begin.reply.first:
            ranks = {tensor: rank for rank, tensor in enumerate(self.begin.reply.first)}
            last = len(ranks)
            chunks = sorted(chunks, key=lambda chunk: min(ranks.get(packed.tensor, last) for packed in chunk.ranges))
        return chunks

    def _gradient_messages(self, packer: Packer, chunks: Sequence[ChunkLayout]) -> Iterator[bytes]:
        """Make the messages of a step as they are asked for; a small step is one."""
        for index, chunk in enumerate(chunks):
            yield self._gradient_message(packer, chunk, begins=index == 0, ends=index == len(chunks) - 1)

    def _fed_messages(self, packer: Packer, chunks: Sequence[ChunkLayout], feed: GradientFeed) -> Iterator[bytes]:
        """Make the messages of a step whose gradients are made meanwhile; the commit is one of its own."""
        self.gradients = flat = list(self.gradients)
        begun = False
        for chunk in feed.chunks(chunks, flat):
            yield self._gradient_message(packer, chunk, begins=not begun, ends=False)
            begun = True
        if feed.committed():
            end = pb.AttachRequest(commit=self.commit)
            if not begun:
                end.begin.CopyFrom(self.begin)
            yield end.SerializeToString()

    def _gradient_message(self, packer: Packer, chunk: ChunkLayout, *, begins: bool, ends: bool) -> bytes:
        header, dtype = pb.AttachRequest(), self.gradient_dtype
        header.chunk.offset, header.chunk.count = chunk.offset, chunk.elements
        if begins:
            header.begin.CopyFrom(self.begin)
        if ends:
            header.commit.CopyFrom(self.commit)
        frame = FrameBuffer(header, wire_bytes(dtype, chunk.elements))
        packer.write(self.gradients, chunk.ranges, frame.payload(dtype), chunk.offset, self.feedback)
        return frame.finish()
