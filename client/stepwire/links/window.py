"""The steps that a server with checkpoints may still lose, kept so that they can be sent again by their numbers.

A step is kept as the messages that were sent: the bytes are there already, so keeping them copies nothing. Over shared
memory a step has no such messages, and is packed once more.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stepwire.errors import StateLossError
from stepwire.links.hold import Hold
from stepwire.steps.call import StepCall
from stepwire.steps.description import SessionDescription
from stepwire.v1 import session_pb2, step_pb2
from stepwire.wire.dtypes import FLOAT32

__all__ = ["ReplayWindow"]


class _Kept(NamedTuple):
    """One applied step: its number, and its messages."""

    step: int
    begin: step_pb2.StepBegin
    commit: step_pb2.StepCommit
    messages: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.messages))

    def call(self) -> StepCall:
        """Return the call that sends the step again, without a reply."""
        begin, commit = step_pb2.StepBegin(), step_pb2.StepCommit()
        begin.CopyFrom(self.begin)
        commit.CopyFrom(self.commit)
        begin.ClearField("reply")
        begin.reply.mode = step_pb2.REPLY_MODE_NONE
        return StepCall(begin, [], np.dtype(FLOAT32), [], np.dtype(FLOAT32), commit=commit, recorded=self.messages)


class ReplayWindow:
    """The last steps of one session, up to a number of bytes. The session serialises its calls.

    Steps are kept for as long as the worker is held without a break. Another client may have taken steps of the same
    numbers before this one acquired it anew, and nobody may replace those.
    """

    def __init__(self, description: SessionDescription, hold: Hold, limit_bytes: int) -> None:
        """Keep at most so many bytes of messages, of a session that may lose steps; else nothing."""
        loses = description.message.config.durability == session_pb2.DURABILITY_CHECKPOINT
        loses &= not description.is_aggregated  # the steps of a session are not one worker's
        self._limit_bytes = limit_bytes if loses else 0
        self._description = description
        self._hold = hold
        self._acquisitions = hold.acquisitions
        self._kept: deque[_Kept] = deque()
        self._nbytes = 0

    @property
    def keeps(self) -> bool:
        """Steps are kept."""
        return self._limit_bytes > 0

    @property
    def nbytes(self) -> int:
        """The bytes of the messages that are kept."""
        return self._nbytes

    def record(self, call: StepCall) -> None:
        """Have the messages of a step kept as they are sent."""
        call.record = [] if self._limit_bytes else None

    def resend(self, send: Callable[[StepCall], step_pb2.StepResult], loss: StateLossError) -> None:
        """Send the steps again that the server has lost; those that it loses meanwhile as well.

        Where that is cut short, the client goes on knowing all of them, so that its next call finds the loss again.

        Raises:
            StateLossError: one of them is not kept.
            StepwireError: as `send`.
        """
        last = loss.applied_step
        while (kept := self._lost(loss, last)) is not None:
            try:
                for lost in kept:
                    send(lost)
                return
            except StateLossError as again:
                loss = again
            except BaseException:
                self._hold.acknowledge(last)
                raise
        raise loss if loss.applied_step >= last else loss.through(last)

    def keep(self, call: StepCall) -> None:
        """Keep a step that was applied, and let go of those that are durable or too many.

        The error feedback of the step is still pending: packing it once more brings the bytes that were applied.
        """
        if not self._limit_bytes:
            return
        self._forget_others()
        messages = tuple(call.record or self._packed(call))
        if not self._kept or self._kept[-1].step < call.begin.step:  # else its reply was lost, and it is kept already
            self._kept.append(_Kept(call.begin.step, call.begin, call.commit, messages))
            self._nbytes += self._kept[-1].nbytes
        while self._kept and (self._kept[0].step <= self._hold.durable_step or self._nbytes > self._limit_bytes):
            self._nbytes -= self._kept.popleft().nbytes

    def clear(self) -> None:
        """Keep nothing: the steps belong to a state that is gone."""
        self._kept.clear()
        self._nbytes = 0

    def _forget_others(self) -> None:
        """Keep nothing of the time before the worker was acquired anew."""
        if self._acquisitions != self._hold.acquisitions:
            self._acquisitions = self._hold.acquisitions
            self.clear()

    def _lost(self, loss: StateLossError, last: int) -> list[StepCall] | None:
        """Return the calls that make good a loss of the steps up to one, in order; None if one of them is not kept."""
        self._forget_others()
        found = [kept for kept in self._kept if loss.durable_step < kept.step <= last]
        wanted = list(range(loss.durable_step + 1, last + 1))
        if loss.lost_load or [kept.step for kept in found] != wanted:
            return None
        return [kept.call() for kept in found]

    def _packed(self, call: StepCall) -> list[bytes]:
        """Return the messages of a step that went over shared memory, or whose reply alone came over this stream."""
        alone = dataclasses.replace(call, record=None)
        return list(alone.messages(self._description.packer, self._description.chunk_bytes, again=False))
