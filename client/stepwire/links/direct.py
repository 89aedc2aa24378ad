"""Direct steps: those that the caller's own thread makes on its packet lane, without an errand.

A small step on a lane needs nothing of gRPC, and the two switches of threads that an errand costs take longer than the
step. But an exception can arrive in the caller's thread between any two instructions, and so can the handler of a
signal, which may call the session. These rules make both harmless:

- **The step is under way** from before its sending until nothing but returns is left. Whoever finds it under way at
  the session's lock settles it first. So no later step reads its reply.
- **An interrupted step is left.** An errand, put before anything else can arrive, drops the stream and puts the step in
  doubt, as after any failure. The caller waits for it, since the gradient's fingerprint is computed there.
- **A handler that calls the session** makes an errand, which needs the lock. So the step gives way: its thread releases
  the lock, and acquires it again behind the handler. A step that was sent by then is brought to its end by the errand,
  over another stream. A step that was not sent goes the ordinary way.
- **Everything but a plain reply** is an errand's: the reply is given back to the lane, where the errand receives it.

Instructions without a call between them are one: the interpreter handles signals after calls, at jumps back and at the
start of functions alone.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Generic, Protocol, TypeVar, cast

import numpy as np
from google.protobuf.message import DecodeError

from stepwire.connection.errands import PreparedErrand, ends_with, in_thread, is_heard, run, undelivered
from stepwire.connection.retry import Deadline
from stepwire.links.doubts import Doubts
from stepwire.links.hold import Hold
from stepwire.steps.call import StepCall
from stepwire.steps.description import SessionDescription
from stepwire.steps.exchanges import StepExchange
from stepwire.transports.packets import NO_SIGNAL, is_end
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2

__all__ = ["DirectStep", "DirectSteps", "StepsByNumber"]

_T = TypeVar("_T")
_MOST_ELEMENTS: Final = 128 << 10
"""The parameters of a session with direct steps. Copies of larger ones have threads, and locks of Python's own."""


class StepsByNumber(Protocol):
    """The part of a session's link that direct steps need; a `RemoteLink` is one."""

    @property
    def description(self) -> SessionDescription:
        """The session as its server described it."""

    @property
    def lock(self) -> threading.RLock:
        """The lock that serialises the steps and loads of the session."""

    def deadline(self, timeout: float | None) -> Deadline:
        """Start the deadline of a call."""

    def made_directly(self, step: DirectStep[Any], result: step_pb2.StepResult) -> bool:
        """Note a step, unless it gave way; no handler of a signal runs between that look and the last number."""

    def completed(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Bring a call that has its number to its end."""

    def undelivered(self, call: StepCall) -> None:
        """Put a step in doubt whose outcome reached nobody."""


class DirectStep(Generic[_T]):
    """One direct step; see `errands.GivesWay`.

    Attributes:
        began: the time of its begin, of the monotonic clock.
        gave_way: others have had the session's lock since the step began.
        is_left: its caller was interrupted.
        exchange: its message and its reply; None before it is sent.
        result: the result that an errand got.
        failure: the error that an errand got.
        beside: the call by which another errand brought it to its end; its reply has places of its own.
    """

    __slots__ = ("_lock", "began", "beside", "exchange", "failure", "gave_way", "is_left", "result")

    def __init__(self, lock: threading.RLock) -> None:
        """Begin, without the lock."""
        self._lock = lock
        self.began = time.monotonic()
        self.gave_way = self.is_left = False
        self.exchange: StepExchange[_T] | None = None
        self.result: step_pb2.StepResult | None = None
        self.failure: BaseException | None = None
        self.beside: StepCall | None = None

    def give_way(self) -> bool:
        """See `GivesWay`."""
        self.gave_way = True
        try:
            self._lock.release()
        except RuntimeError:  # this thread does not have it
            return False
        return True

    def go_on(self) -> None:
        """See `GivesWay`."""
        self._lock.acquire()


class DirectSteps:
    """The direct steps of one session. The session's lock serialises them."""

    def __init__(
        self, link: StepsByNumber, hold: Hold, doubts: Doubts, seconds: Callable[[float | None], float]
    ) -> None:
        """Make steps under a hold, and leave the others to the link.

        Args:
            link: the link.
            hold: the hold of the worker.
            doubts: the doubts of the session.
            seconds: returns the seconds of a deadline; None is the client's default.
        """
        self._link = link
        self._hold = hold
        self._doubts = doubts
        self._lock, layout = link.lock, link.description.packer.layout
        self._seconds, self._default_seconds = seconds, seconds(None)
        self._possible = layout.size <= _MOST_ELEMENTS and not layout.tables
        self._under_way: DirectStep[Any] | None = None
        self._leaving = PreparedErrand(self._settle_left)

    def step(self, begin: Callable[[SharedArrays | None], StepExchange[_T]], timeout: float | None) -> _T | None:
        """Make a step, and return what its caller gets; None, with nothing done, where the step needs an errand.

        Args:
            begin: checks the step, and returns its exchange over the memory that the stream shares, if there is some.
            timeout: seconds; None for the client's default.

        Raises:
            StepwireError: as `SessionLink.step`.
        """
        if not self._possible or self._hold.lane is None or in_thread.direct is not None:
            return None
        seconds, made = self._default_seconds if timeout is None else self._seconds(timeout), None
        step: DirectStep[_T] = DirectStep(self._lock)
        try:
            try:
                in_thread.direct = step
                self._lock.acquire()
                made = self._attempt(step, begin, seconds)
            finally:
                in_thread.direct = None
                try:
                    self._lock.release()  # nothing arrives before this
                except RuntimeError:  # an interrupt came while the lock was another thread's
                    pass
        except BaseException:
            if step.exchange is not None:
                step.is_left, self._under_way = True, step
                self._leaving.put()  # nothing arrives before this, not even a second interrupt
                self._leaving.wait()
            raise
        if made is not None or step.exchange is None:
            return made
        return run(functools.partial(self._finished, step, timeout))

    def settle(self, deadline: Deadline) -> None:
        """Settle a step that is under way: in doubt if its caller has left it, else at its end. It needs the lock.

        The thread of a step that gave way may have received the reply. So the step is repeated, over another stream.
        The thread may also be in the middle of reading the reply, and goes on with that later. So the repetition has
        places of its own.
        """
        if (step := self._under_way) is None:
            return
        self._under_way = None
        if step.is_left:
            self._put_in_doubt(_sent(step))
        else:
            self._hold.displaced()
            step.beside = _beside(_sent(step))
            self._complete(step, step.beside, deadline)

    def _attempt(
        self, step: DirectStep[_T], begin: Callable[[SharedArrays | None], StepExchange[_T]], seconds: float
    ) -> _T | None:
        """Make a step as far as it needs no errand; one that was sent has its exchange."""
        hold = self._hold
        lane = hold.free_lane
        if lane is None or self._under_way is not None or not self._doubts.are_none:
            return None
        exchange, number = begin(hold.shared), hold.applied_step + 1
        message = exchange.message(number, hold.epoch, hold.applied_load)
        if message is None or step.gave_way:  # nothing arrives between this look and the sending
            return None
        exchange.lane, step.exchange, self._under_way = lane, exchange, step
        try:
            lane.put(message, NO_SIGNAL)
        except OSError as error:
            if not is_end(error):  # the end shows itself at the reply
                raise
        exchange.prepare()  # while the server is at work
        if (result := self._result(step, exchange, number, seconds)) is None:
            return None
        made: _T = exchange.delivered(result)
        if is_heard():
            undelivered(self._undelivered, exchange)
        if self._under_way is step:
            self._under_way = None
        return made

    def _result(
        self, step: DirectStep[Any], exchange: StepExchange[Any], number: int, seconds: float
    ) -> step_pb2.StepResult | None:
        """Wait for the reply, read it and note it; None if it is an errand's to read."""
        lane = exchange.lane
        assert lane is not None
        if is_heard():
            ends_with(lane.end_waits)
        if not (message := lane.receive(seconds)):
            return None
        try:
            reply = pb.AttachResponse.FromString(message)
        except DecodeError:  # no other error is caught: it may be that of a handler
            reply = pb.AttachResponse()
        if reply.HasField("result"):
            self._hold.answered_step, result = number, reply.result
            if exchange.read(reply) and self._link.made_directly(step, result):
                return result
        lane.give_back(message)
        return None

    def _undelivered(self, exchange: StepExchange[Any]) -> None:
        call = exchange.call()
        call.sent = True  # so that it can be in doubt; a refused one cannot
        self._link.undelivered(call)

    def _finished(self, step: DirectStep[_T], timeout: float | None) -> _T:
        """Bring a step to its end, unless another errand did, and return what its caller gets."""
        with self._lock:
            if self._under_way is step:
                self._under_way = None
                deadline = self._link.deadline(timeout)
                deadline.spend(time.monotonic() - step.began)
                self._complete(step, _sent(step), deadline)
            if step.failure is not None:
                raise step.failure
            if step.beside is not None:
                _move_reply(step.beside, _sent(step))
            assert step.result is not None and step.exchange is not None
            undelivered(self._link.undelivered, _sent(step))
            return step.exchange.delivered(step.result)

    def _complete(self, step: DirectStep[Any], call: StepCall, deadline: Deadline) -> None:
        try:
            step.result = self._link.completed(call, deadline)
        except BaseException as failure:
            step.failure = failure

    def _settle_left(self) -> None:
        """Settle the step that its caller has left, in a thread of the client's own."""
        self._leaving = PreparedErrand(self._settle_left)
        with self._lock:
            if (step := self._under_way) is not None and step.is_left and step.exchange is not None:
                self._under_way = None
                self._put_in_doubt(_sent(step))

    def _put_in_doubt(self, call: StepCall) -> None:
        """Drop the stream, and put a step in doubt; another thread may have stepped or loaded since it was released."""
        hold, begin = self._hold, call.begin
        if begin.load == hold.applied_load and hold.applied_step - begin.step in (-1, 0):
            hold.displaced()
            call.sent = True
            self._doubts.failed(call)


def _sent(step: DirectStep[Any]) -> StepCall:
    """Return the call of a step that was sent."""
    assert step.exchange is not None
    return step.exchange.call()


def _beside(call: StepCall) -> StepCall:
    """Return the same call with other places for its reply."""
    views = None if call.views is None else type(call.views)()
    return dataclasses.replace(call, targets=[np.empty_like(place) for place in call.targets], views=views)


def _move_reply(beside: StepCall, call: StepCall) -> None:
    """Move the reply of a call to the places of another one."""
    for place, values in zip(call.targets, beside.targets, strict=True):
        place[:] = values
    if isinstance(call.views, list):
        call.views[:] = beside.views or ()
    elif call.views is not None:
        call.views.clear()
        call.views.update(cast(dict[str, Any], beside.views))
