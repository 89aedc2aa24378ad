"""The steps of a session that a compiled lane makes: granted, and settled when the grant has ended.

A grant is for the next steps of one holder, in one epoch, with one load and the same settings: nothing of that changes
but under the session's lock, which ends the grant. Everything else is Python's: a lane hands over what it does not
expect, and the session admits or refuses it as ever.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from stepwire_server.engines.cpu import lane_words as word
from stepwire_server.engines.cpu.engine import CpuEngine
from stepwire_server.engines.cpu.lane_loop import LaneLoop, Seat
from stepwire_server.engines.cpu.lane_words import CLIPS
from stepwire_server.engines.protocol import GRAIN, HostArray
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import GroupResult, StepResult, StepTimes
from stepwire_server.rules import Recipe
from stepwire_server.sessions.calls_under_way import LastUse
from stepwire_server.sessions.contributions import Parts
from stepwire_server.sessions.lane_batch import MOST_STEPS, LaneBatch, lane_batch, may_have_lane, steps_ahead
from stepwire_server.sessions.workers import Holder

__all__ = ["LaneSteps", "SteppedLane"]


_Kind = tuple[Recipe, np.dtype[Any], "np.dtype[Any] | None"]


class SteppedLane(Protocol):
    """A lane as its session sees it. All calls come under the session's lock.

    Attributes:
        send_seconds: the time of sending the last reply.
    """

    send_seconds: float

    @property
    def may_compile(self) -> bool:
        """A loop may be compiled for it: so many steps were alike that it pays."""
        ...

    def seat(self, loop: LaneLoop) -> Seat | None:
        """Return the lane's place in a loop; None where there is none left."""
        ...

    def lay_out(self, seat: Seat, first: StepResult) -> bool:
        """Lay out the messages of the steps to come; False where they cannot be expected.

        Args:
            seat: the place of the lane.
            first: the result of the first step, with 1 in the place of all that is measured.
        """
        ...

    def open(self, seat: Seat) -> bool:
        """Begin the grant; False where the server grants nothing any more."""
        ...

    def settled(self, request: StepRequest, result: StepResult, record: HostArray) -> None:
        """Note a step that was made and replied to, by its record."""
        ...


class LaneSteps:
    """The door of a session for compiled lanes. Thread-safe: it shares the session's lock.

    Attributes:
        possible: steps of this session may be made by a compiled lane.
    """

    def __init__(self, parts: Parts, last_use: LastUse) -> None:
        """Use the parts of a session; `last_use` notes each step."""
        self.parts = parts
        self.last_use = last_use
        engine = parts.state.device.engine
        self._loops = engine.lanes if isinstance(engine, CpuEngine) and may_have_lane(parts.config) else None
        self.possible = self._loops is not None
        self._awaited: tuple[StepRequest, _Kind] | None = None
        self._ahead = MOST_STEPS

    def grant(self, holder: Holder, request: StepRequest, lane: SteppedLane) -> bool:
        """Leave the next steps to a lane, until the session's lock is acquired or the lane is at its end.

        Args:
            holder: the hold of the worker that the lane belongs to.
            request: a step on the lane, as it was asked for: those to come are asked for alike.
            lane: the lane.

        Returns:
            False where the steps are Python's.

        Raises:
            OSError: the system has no descriptors left.
        """
        parts = self.parts
        with parts.lock:
            request = request.numbered(parts.ledger.applied_step + 1)
            if self._loops is None or not self.possible or not self._admits(request, holder):
                return False
            if self._awaits(request, lane):
                return False
            if (batch := lane_batch(parts.config, parts.state, request, self._ahead)) is None:
                return False
            kind = batch.recipe, request.gradient_dtype, request.reply_dtype if request.reply else None
            loop = self._loops.loop(*kind, make=lane.may_compile)
            self._awaited = (request, kind) if loop is None else None
            seat = None if loop is None else lane.seat(loop)
            if seat is None:
                return False
            grant = _Grant(self, holder, batch, seat, lane)
            if not lane.lay_out(seat, grant.result(0)):
                return False
            return parts.lock.give(grant, lambda: lane.open(seat))

    @property
    def awaits_loop(self) -> bool:
        """Nothing but the loop was missing, and it may come."""
        return self._awaited is not None

    def _awaits(self, request: StepRequest, lane: SteppedLane) -> bool:
        """Tell whether the loop of steps like this one is still missing, without computing any of them."""
        if self._loops is None or self._awaited is None or not _is_like(request, self._awaited[0]):
            return False
        return self._loops.loop(*self._awaited[1], make=lane.may_compile) is None

    def settle(self) -> None:
        """End the grant, if there is one, and count the steps that were made."""
        self.parts.lock.settle()

    def learn(self, computed: int, made: int) -> None:
        """Note the steps that were computed for a grant, and those that were made; see `steps_ahead`."""
        self._ahead = steps_ahead(self._ahead, computed, made)

    def _admits(self, request: StepRequest, holder: Holder) -> bool:
        """Tell whether the session would admit the next step under this hold."""
        ledger = self.parts.ledger
        usable = ledger.ready and not (ledger.closed or ledger.damaged or ledger.freeze)
        usable = usable and ledger.worker.holder is holder
        return usable and request.epoch == ledger.epoch and request.load in (None, ledger.applied_load)


def _is_like(one: StepRequest, other: StepRequest) -> bool:
    same = one.groups is other.groups and one.gradient_dtype == other.gradient_dtype
    return same and (one.reply, one.reply_dtype) == (other.reply, other.reply_dtype)


class _Grant:
    """One grant; see `session_lock.Grant`. It keeps the memory that the lane has the addresses of."""

    def __init__(self, steps: LaneSteps, holder: Holder, batch: LaneBatch, seat: Seat, lane: SteppedLane) -> None:
        """Write the steps to come down in the row of a seat."""
        self._steps, self._holder, self._batch, self._seat, self._lane = steps, holder, batch, seat, lane
        config, row, count = steps.parts.config, seat.row, len(batch.groups)
        blocks, groups = -(-config.layout.size // GRAIN), len(batch.t)
        self._records: HostArray = np.zeros((count, word.COLUMNS + word.GROUP_COLUMNS * groups))
        for group in range(groups):
            rates = [used[group].lr for used in batch.groups]
            self._records[:, word.COLUMNS + word.GROUP_COLUMNS * group + word.GROUP_RATE] = rates
        clip, formula = config.treatment.clip_grad_norm, config.treatment.clip_formula or "torch"
        numbers = np.array([batch.unscale, clip or 0.0, lane.send_seconds])
        places = {
            word.RECORDS: self._records,
            word.SCALARS: batch.scalars,
            word.SEGMENTS: batch.segments,
            word.RANGES: batch.ranges,
            word.PARTIALS: np.zeros((1, blocks)),
            word.SUMS: np.zeros(4),
            word.NUMBERS: numbers,
            **{word.ARRAYS + place: array for place, array in enumerate(batch.arrays)},
        }
        self._kept = list(places.values())
        for place, array in places.items():
            row[place] = array.ctypes.data
        row[word.ROW], row[word.ROWS], row[word.RECORD_COLUMNS] = 0, count, self._records.shape[1]
        row[word.SEGMENT_COUNT], row[word.RANGE_COUNT] = len(batch.segments), len(batch.ranges)
        row[word.BLOCKS], row[word.SIZE], row[word.GROUPS] = blocks, config.layout.size, groups
        row[word.CLIP] = 0 if clip is None else 1 + CLIPS.index(formula)
        row[word.COUNT], row[word.UNSENT] = word.NOT_RECEIVED, 0

    def end(self) -> None:
        """See `Grant`."""
        self._seat.end()

    def settle(self) -> None:
        """See `Grant`: the session counts the steps, and its sinks are told of them in their order."""
        parts, done = self._steps.parts, int(self._seat.row[word.ROW])
        for index in range(done):
            request, result = self._batch.request.numbered(self._batch.request.step + index), self.result(index)
            with parts.ledger.changing("step", request.step):  # the arrays have it, and those behind it
                parts.state.tensor_steps.advance(parts.config.active, self._batch.groups[index])
                parts.commits.note_of_lane(request, self._holder, result)
                self._lane.settled(request, result, self._records[index])
        self._steps.learn(len(self._batch.groups), done)
        if done:
            parts.state.flow.count(float(self._records[:done, word.APPLY].sum()))
            self._steps.last_use.note()

    def result(self, index: int) -> StepResult:
        """Return the result of a step; before it is made, with 1 in the place of all that is measured."""
        made, batch, epoch = index < self._seat.row[word.ROW], self._batch, self._steps.parts.ledger.epoch
        record = self._records[index].tolist() if made else [1.0] * self._records.shape[1]
        measures = batch.recipe.measures
        moved = (record[word.UPDATE_NORM], record[word.PARAM_NORM]) if measures else (None, None)
        groups = []
        for group, hyper in enumerate(batch.groups[index]):
            norm, clipped, factor, _ = record[word.COLUMNS + word.GROUP_COLUMNS * group :][: word.GROUP_COLUMNS]
            groups.append(GroupResult(norm, hyper, batch.t[group] + index, clipped, factor, *moved))
        return StepResult(
            step=batch.request.step + index,
            epoch=epoch,
            skipped=False,
            grad_norm=record[word.NORM],
            non_finite_count=0,
            groups=tuple(groups),
            times=StepTimes(record[word.RECEIVE], record[word.QUEUE], record[word.APPLY]),
            clipped_grad_norm=record[word.CLIPPED_NORM],
            clip_coefficient=record[word.COEFFICIENT],
            update_norm=moved[0],
            param_norm=moved[1],
        )
