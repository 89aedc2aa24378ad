"""Steps alike: those that differ from the step before in their number and in their gradient alone.

Almost all steps of a training are alike. So what they have in common is made once: the checks of their options and
arrays, and their message but for its numbers. The ordinary way of a small step is mostly that.

A step that comes to its end needs no `StepCall`. One that does not has it made then, for its repetition.

Steps alike are sent over shared memory alone, with all options as created but for `out`, and with a dict of arrays that
are recognised. All others go the ordinary way, which is the one home of every check and every error.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np

from stepwire.arrays.packing import Container, Flat, Packer
from stepwire.arrays.ranges import Ranges
from stepwire.arrays.recognised import FITTING, ArrayForm, RecognisedArrays
from stepwire.steps.call import StepCall
from stepwire.steps.exchanges import Remember
from stepwire.steps.reply_places import SHOWN, ReplyPlaces
from stepwire.transports.packets import PacketLane
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire.wire.dtypes import BFLOAT16, FLOAT32

__all__ = ["AlikeExchange", "AlikeSteps"]


class _Kind(NamedTuple):
    """The common part of steps alike.

    Attributes:
        shared: refers to the memory that their gradients and replies lie in, and does not keep it.
        form: the form of their gradients.
        fits: the gradients are copied to the memory as they are.
        request: their message. Only the holder of the session's lock changes it.
        begin: the opening in it.
    """

    shared: weakref.ref[SharedArrays]
    form: ArrayForm
    fits: bool
    request: pb.AttachRequest
    begin: step_pb2.StepBegin


class AlikeSteps:
    """The steps alike of one session. The session serialises them.

    Attributes:
        packer: the packer of the session.
        gradient_dtype: the encoding of a gradient.
        reply_dtype: the encoding of a reply.
        remember: is told of each step.
    """

    def __init__(
        self,
        packer: Packer,
        begin: step_pb2.StepBegin,
        dtypes: tuple[np.dtype[Any], np.dtype[Any]],
        given: RecognisedArrays,
        places: ReplyPlaces,
        remember: Remember,
    ) -> None:
        """Know no step yet.

        Args:
            packer: the packer of the session.
            begin: the opening of a step whose options are those of the session's creation.
            dtypes: the encodings of its gradient and of its reply.
            given: recognises gradients.
            places: finds the places of replies.
            remember: is told of each step.
        """
        self.packer, (self.gradient_dtype, self.reply_dtype) = packer, dtypes
        self.remember = remember
        self._given, self._places = given, places
        self._begin = begin
        self._kind: _Kind | None = None

    def exchange(self, gradients: Any, out: Any, shared: SharedArrays, began: float) -> AlikeExchange | None:
        """Write a gradient to its place, and return its step; None, with nothing done, for a step of another kind.

        Args:
            gradients: what the user gave.
            out: what the user gave for the reply; None for new arrays.
            shared: the memory that the stream shares.
            began: the time of the step's begin, of `time.perf_counter`.

        Raises:
            InvalidRequestError: as `ReplyPlaces.check_apart`.
        """
        kind, given = self._kind, self._given
        if kind is None or kind.shared() is not shared or kind.form is not given.form:
            kind = self._learnt(shared)
        if kind is None or not kind.fits or (known := given.recalls(gradients)) is None:
            return None
        flat, mark = given.again(gradients), None if known is FITTING else known
        exchange = AlikeExchange(self, kind, shared, flat, mark)
        exchange.began = began
        if out is not None:
            if (known_out := self._places.recognise(out)) is None:
                return None
            if known_out is SHOWN:
                exchange.views = {}
            else:
                _, targets = exchange.out = self._places.of(gradients, out, known_out, self.reply_dtype)
                self._places.check_apart(flat, targets, mark, known_out)
        return exchange if shared.write_again(flat, mark) else None

    def _learnt(self, shared: SharedArrays) -> _Kind | None:
        """Know the steps whose gradients have the form of the last ones; None if there were none to know."""
        if (form := self._given.form) is None:
            return None
        dtype = self.gradient_dtype
        fits = dtype in (FLOAT32, BFLOAT16) and (dtype, self.reply_dtype) == (shared.gradient_dtype, shared.reply_dtype)
        fits = fits and all([dtype == own for _, _, own in form.arrays])
        request = pb.AttachRequest(begin=self._begin, commit=step_pb2.StepCommit())
        request.begin.in_shared_memory = True
        kind = self._kind = _Kind(weakref.ref(shared), form, fits, request, request.begin)
        return kind


class AlikeExchange:
    """The exchange of a step that is like those before it.

    Attributes:
        began: the time of the step's begin, of `time.perf_counter`.
        lane: see `StepExchange`.
        out: the user's arrays for the reply, and their 1-D views in layout order; None for others.
        views: the container that shows the shared memory as the reply; None for a reply that is copied.
    """

    __slots__ = (
        "_call",
        "_flat",
        "_kind",
        "_mark",
        "_numbers",
        "_shared",
        "_steps",
        "_targets",
        "began",
        "lane",
        "out",
        "views",
    )

    def __init__(self, steps: AlikeSteps, kind: _Kind, shared: SharedArrays, flat: Flat, mark: object | None) -> None:
        """Have nothing sent yet, and a reply of new arrays."""
        self._steps, self._kind, self._shared, self._flat, self._mark = steps, kind, shared, flat, mark
        self.began = 0.0
        self._call: StepCall | None = None
        self._targets: Ranges | None = None
        self.lane: PacketLane | None = None
        self.out: tuple[Container | None, Flat] | None = None
        self.views: dict[str, Any] | None = None

    def message(self, step: int, epoch: int, load: int) -> bytes:
        """See `StepExchange.message`."""
        self._numbers = step, epoch, load
        _, _, _, request, begin = self._kind
        begin.step, begin.epoch, begin.load = step, epoch, load
        message: bytes = request.SerializeToString()
        return message

    def prepare(self) -> None:
        """See `StepExchange.prepare`."""
        if self.out is None and self.views is None:
            self._new().made()

    def read(self, reply: pb.AttachResponse) -> bool:
        """See `StepExchange.read`."""
        if self.views is not None:
            self.views |= self._shared.parameter_views()
        else:
            self._shared.read(self._new() if self.out is None else self.out[1])
        return True

    def call(self) -> StepCall:
        """See `StepExchange.call`."""
        if self._call is None:
            begin = step_pb2.StepBegin()
            begin.CopyFrom(self._kind.begin)
            begin.ClearField("in_shared_memory")
            begin.step, begin.epoch, begin.load = self._numbers
            sent, received = self._steps.gradient_dtype, self._steps.reply_dtype
            targets: Flat = self._new() if self.out is None else self.out[1]
            self._call = StepCall(
                begin, self._flat, sent, targets, received, views=self.views, recognised=self._mark, lane=self.lane
            )
        return self._call

    def delivered(self, result: step_pb2.StepResult) -> Any:
        """See `StepExchange.delivered`."""
        self._steps.remember(self.began, result)
        if self.out is not None:
            return self.out[0]
        return self.views or self._new().container  # a stream without shared memory has left the views empty

    def _new(self) -> Ranges:
        """Return the new arrays of the reply."""
        if self._targets is None:
            targets = self._steps.packer.to_come(self._steps.reply_dtype, self._kind.form.names)
            if self._targets is None:  # nothing arrives between this look and the store
                self._targets = targets
        return self._targets
