"""The link to a sharded session: all shards attached, all at the same step, and stepped together.

The link is used as the link to one session is, and gives the same parameters, bit for bit. Each shard's link knows what
its server has applied. So a step that failed on some servers has one of two ends: the same gradient again finishes it,
as each server applies or replays the step; or a load replaces it. Any other gradient is refused in between.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from stepwire.arrays.packing import Flat
from stepwire.arrays.rows import PulledRows
from stepwire.connection.errands import undelivered
from stepwire.connection.retry import Deadline
from stepwire.errors import StepMismatchError
from stepwire.links.link import Load, SessionLink
from stepwire.links.past import LinkPast
from stepwire.links.remote import RemoteLink
from stepwire.results import SessionInfo, SessionStatistics, TransportChoice
from stepwire.sharding.combine import combined, combined_header, combined_info, combined_statistics, least_transport
from stepwire.sharding.coordinator import Abandoned, Coordinator
from stepwire.sharding.fan_out import fan_out
from stepwire.sharding.levelling import load_all
from stepwire.sharding.mismatches import half_applied, half_loaded, uneven
from stepwire.sharding.open_rounds import await_open_rounds
from stepwire.sharding.partition import Partition
from stepwire.sharding.reading import AlikeReader, own_failure
from stepwire.sharding.refusals import check_load, fed_gradients, shared_arrays
from stepwire.sharding.shard import Shard, carry_over, gathered
from stepwire.sharding.whole import bounds_of, check_alike, whole_session
from stepwire.steps.call import StepCall
from stepwire.steps.carry import Carry
from stepwire.steps.description import SessionDescription
from stepwire.steps.doubt import Doubt, UntoldSteps, unfinished
from stepwire.transports.shared import SharedArrays
from stepwire.v1 import state_pb2, step_pb2

__all__ = ["ShardedLink"]

_T = TypeVar("_T")


class ShardedLink(SessionLink):
    """The link to one model over several sessions.

    - A load that fails may have been committed on some servers. Then steps and pulls raise StepMismatchError, until
      another load levels the shards.
    - A step that fails may have been applied on some servers: repeat it with the same gradients, or load. If the
      client ends in between, shards stay at different steps. Then `applied_step`, steps and pulls raise
      StepMismatchError, until a state is loaded into all shards.
    - `on_tensor` is called in the threads of shards, one call at a time.
    """

    def __init__(self, links: Sequence[RemoteLink], partition: Partition) -> None:
        """Link to the sessions of the shards.

        Args:
            links: the links of the shards, in order.
            partition: the ranges of each shard.

        Raises:
            InvalidRequestError: the sessions are not those of one model.
        """
        messages = [link.description.message for link in links]
        check_alike(messages)
        whole = whole_session(messages, partition.layout)
        self._description = SessionDescription.of(whole, links[0].description.chunk_bytes)
        self._carry = Carry(whole, partition.layout.size, error_feedback=False)
        self._partition = partition
        self._shards = [
            Shard(link, ranges, rank) for rank, (link, ranges) in enumerate(zip(links, partition.shards, strict=True))
        ]
        self._bounds = bounds_of(whole)
        self._is_aggregated = self._description.is_aggregated
        self._limited = whole.config.gradient.HasField("clip_grad_value")
        self._doubt: Doubt | None = None
        self._untold = UntoldSteps()
        self._coordinator: Coordinator | None = None  # of the step in doubt
        self._step: int | None = None  # under way, or in doubt
        self._load: int | None = None  # that they belong to
        self._last_result: step_pb2.StepResult | None = None
        self._lock = threading.RLock()

    @property
    def description(self) -> SessionDescription:
        """The whole, as one server would describe it; its id is the ids of all shards, joined by commas."""
        return self._description

    @property
    def lock(self) -> threading.RLock:
        """See `SessionLink.lock`."""
        return self._lock

    @property
    def carry(self) -> Carry:
        """See `SessionLink.carry`; error feedback is kept by each shard for itself."""
        return self._carry

    @property
    def shards(self) -> tuple[RemoteLink, ...]:
        """The links of the shards, in order."""
        return tuple(shard.link for shard in self._shards)

    @property
    def past(self) -> LinkPast:
        """The past of this link, which its successor goes on from."""
        return LinkPast(self._lock, self._carry, self._last_result, self._doubt, self._untold, self._load)

    def succeed(self, former: ShardedLink | RemoteLink) -> None:
        """Go on where the link to the former places of this model stopped: see `RemoteLink.succeed`."""
        self._lock, self._carry, self._last_result, doubt, self._untold, self._load = former.past
        if doubt is not None:
            self._doubt, self._step = doubt.under(self._acquisitions()), doubt.step
        self._coordinator = former._coordinator if isinstance(former, ShardedLink) else None
        carry_over(former._shards if isinstance(former, ShardedLink) else [Shard.whole(former)], self._shards)
        former.detach()

    @property
    def applied_step(self) -> int:
        """The step that all shards are at, or that a step under way or in doubt follows on."""
        under_way = self._step
        steps = [shard.applied_step for shard in self._shards]
        if len(set(steps)) == 1 or self._is_aggregated:  # of several workers' steps, all shards have the least
            return min(steps)
        if under_way is not None and set(steps) <= {under_way - 1, under_way}:
            return under_way - 1
        if under_way != self._step:  # another step began while the shards were asked
            return self.applied_step
        raise uneven(self._shards, steps)

    @property
    def last_result(self) -> step_pb2.StepResult | None:
        """See `SessionLink.last_result`."""
        return self._last_result

    @property
    def transport(self) -> TransportChoice | None:
        """The least of the shards' transports; None before all streams are attached."""
        return least_transport([shard.link.transport for shard in self._shards])

    def deadline(self, timeout: float | None) -> Deadline:
        """See `SessionLink.deadline`."""
        return self._shards[0].link.deadline(timeout)

    # --- streams and steps ---------------------------------------------------------------------------------

    def attach(self, deadline: Deadline, *, transport: str | None = None, take_over: bool = False) -> None:
        """Attach the streams of all shards; see `SessionLink.attach`."""
        self._each(lambda shard: shard.attach(deadline, transport=transport, take_over=take_over))
        self._forget_settled()
        if self._doubt is not None and set(self._steps_on_servers()) == {self._doubt.step}:
            for shard in self._shards:
                shard.link.hold.applied_step = shard.step_on_server

    def detach(self) -> None:
        """Drop all streams; the workers stay held until another client acquires them."""
        for shard in self._shards:
            shard.link.detach()

    def shared(self, deadline: Deadline) -> SharedArrays:
        """Refuse: a tensor that is cut lies in several memories.

        Raises:
            UnsupportedFeatureError: always.
        """
        raise shared_arrays()

    def forget_writes(self) -> None:
        """Do nothing: there are no views of shared memory."""

    def step(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Apply a step on all shards, each exactly once, and combine their results.

        Raises:
            UnsupportedFeatureError: the gradient is still being made.
            StepMismatchError: a shard moved without this client, or some shards applied a step of another gradient.
            StepwireError: the failure of a shard; the step may have been applied on others.
        """
        if call.feed is not None:  # its ranges would be split before they are there
            raise fed_gradients()
        self._attach_missing(deadline)
        call.begin.step = self._number(call, deadline)
        self._coordinator = coordinator = self._coordinator_of(call.begin.step)
        self._step = call.begin.step
        try:
            result = self._step_shards(call, coordinator, deadline)
        except BaseException:
            self._doubt = Doubt.after(call, self._acquisitions())
            raise
        self._settled()
        self._untold.forget()
        self._last_result = result
        undelivered(self._undelivered, call, coordinator)
        return result

    def _undelivered(self, call: StepCall, coordinator: Coordinator | None) -> None:
        """Put a step in doubt whose outcome reached nobody; see `RemoteLink`."""
        with self._lock:
            if self._doubt is None and set(self._steps_on_servers()) == {call.begin.step}:
                for shard in self._shards:
                    shard.link.carry.failed(call)
                self._coordinator, self._step = coordinator, call.begin.step
                self._doubt = Doubt.after(call, self._acquisitions())

    def _step_shards(self, call: StepCall, coordinator: Coordinator | None, deadline: Deadline) -> step_pb2.StepResult:
        call.prepare()
        notifiers = [None] * len(self._shards) if call.on_tensor is None else gathered(self._shards, call)
        calls = [
            functools.partial(shard.step, call, coordinator, notify, deadline)
            for shard, notify in zip(self._shards, notifiers, strict=True)
        ]
        try:
            results = fan_out(calls, lambda: coordinator.abandon() if coordinator is not None else None)
        except Abandoned as given_up:
            if given_up.cause is None:  # an interrupt of the user
                raise
            raise given_up.cause from None
        return combined(results, None if coordinator is None else coordinator.decision, limited=self._limited)

    def _number(self, call: StepCall, deadline: Deadline) -> int:
        """Return the number of a call, once a step in doubt is settled.

        Raises:
            StepMismatchError: a shard moved without this client, or a step of another gradient is half applied, or a
                load was committed on some shards alone, or the call repeats a step whose outcome nobody can tell.
            StepwireError: as `RemoteLink.step`, of a step in doubt.
        """
        if len(set(loads := [shard.applied_load for shard in self._shards])) > 1:
            raise half_loaded(self._shards, loads)
        self._forget_settled()
        self._untold.check(call)
        steps, doubt = self._steps_on_servers(), self._doubt
        if doubt is None:
            self._check_finished()
            known = {shard.contribution for shard in self._shards} if self._is_aggregated else {self.applied_step}
            even = set(steps) == known and len(known) == 1
            if not even and not (self._is_aggregated and all(shard.begins_anew for shard in self._shards)):
                raise uneven(self._shards, steps)
            return max(known.union(steps)) + 1
        if not set(steps) <= {doubt.step - 1, doubt.step}:
            raise uneven(self._shards, steps)
        covered = doubt.covers(call)
        if self._is_aggregated and (len(set(steps)) > 1 or not covered):
            await_open_rounds(self._shards, doubt.step, self._bounds, deadline)
        if covered:
            call.sent = True
            return doubt.step
        return self._resolve(doubt) + 1

    def _resolve(self, doubt: Doubt) -> int:
        """Settle a step in doubt that all shards have applied, or none, and return the step that they are at.

        Raises:
            StepMismatchError, SessionNotReadyError: some shards have applied it, or a shard a part of it.
        """
        self._check_finished()
        if len(set(steps := self._steps_on_servers())) > 1:
            raise half_applied(self._shards, doubt.step, steps)
        for shard in self._shards:
            shard.resolve(applied=steps[0] == doubt.step)
        self._settled()
        return steps[0]

    def _check_finished(self) -> None:
        """Refuse another step, by SessionNotReadyError, while a shard has applied a part of one."""
        if begun := max(shard.link.hold.unfinished_step for shard in self._shards):
            raise unfinished(begun)

    def _coordinator_of(self, step: int) -> Coordinator | None:
        """Return the coordinator of a step: the one whose decision a shard has followed already, or a new one.

        Raises:
            StepMismatchError: a shard has followed a decision that this client does not know.
        """
        if self._bounds is None:
            return None
        steps, known = self._steps_on_servers(), self._coordinator
        if step in steps and known is not None and known.decision is not None:
            return known
        if step in steps and set(steps) != {step} and not self._is_aggregated:  # else the results of shards tell
            raise uneven(self._shards, steps)
        return Coordinator(step, len(self._shards), self._bounds)

    # --- state -------------------------------------------------------------------------------------------

    def pull(self, targets: Mapping[str, Flat], dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """See `SessionLink.pull`.

        Raises:
            StepMismatchError: the shards stayed at different steps or loads; at once if a failed call is the cause.
            StepwireError: as `Session.pull`.
        """
        headers = self._read(self._shards, lambda shard, left: shard.pull(targets, dtype, left), deadline)
        return combined_header(headers, self._partition)

    def pull_rows(self, rows: PulledRows, dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """See `SessionLink.pull_rows`: all shards that have tables are at one step. The header is the first one's."""
        holders = [shard for shard in self._shards if shard.link.description.packer.layout.tables]
        return self._read(holders, lambda shard, left: shard.pull_rows(rows, dtype, left), deadline)[0]

    def _read(
        self, shards: Sequence[Shard], read: Callable[[Shard, Deadline], state_pb2.PullHeader], deadline: Deadline
    ) -> list[state_pb2.PullHeader]:
        """Read some shards, all as of one moment; see `pull`."""
        untold = self._untold.doubts
        reader = AlikeReader(shards, lambda steps, loads: self._own_failure(shards, steps, loads))
        headers = reader.read(read, deadline, together=not self._is_aggregated)
        self._untold.forget(untold)
        return headers

    def _own_failure(
        self, shards: Sequence[Shard], steps: Sequence[int], loads: Sequence[int]
    ) -> StepMismatchError | None:
        """See `own_failure`; the result is None while a call of this client is under way."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return own_failure(shards, self._doubt, steps, loads)
        finally:
            self._lock.release()

    def load(self, load: Load, deadline: Deadline) -> None:
        """See `SessionLink.load`. After a step or a load that failed, any load brings all shards to one of each."""
        check_load(load, self._partition.layout)
        if not load.whole:
            self.make_sure(deadline)
        load_all(self._shards, load, deadline, together=self._is_aggregated)
        self._settled()

    def initialize(self, load: Load, deadline: Deadline) -> None:
        """See `SessionLink.initialize`; only shards without parameters are loaded."""
        self._each(lambda shard: shard.initialize(load, deadline))

    def ask(self, method: str, request: Any, response: Any, deadline: Deadline) -> list[Any]:
        """See `SessionLink.ask`."""
        return self._each(lambda shard: shard.ask(method, request, response, deadline))

    def make_sure(self, deadline: Deadline) -> None:
        """See `SessionLink.make_sure`."""
        self._each(lambda shard: shard.make_sure(deadline))

    def info(self, deadline: Deadline) -> SessionInfo:
        """Ask the servers: bytes are added up, and of numbers, flags and times the least counts."""
        return combined_info(self._description.session_id, self._each(lambda shard: shard.info(deadline)))

    def statistics(self) -> SessionStatistics:
        """See `SessionLink.statistics`."""
        step = None if self._doubt is None else self._doubt.step
        begun = any(shard.link.hold.answered_step == step for shard in self._shards)
        return combined_statistics([shard.link.statistics() for shard in self._shards], step, reply_begun=begun)

    def close(self) -> None:
        """End all shards on their servers; see `SessionLink.close`."""
        self._each(lambda shard: shard.link.close())

    # --- all shards --------------------------------------------------------------------------------------

    def _settled(self) -> None:
        """Note that no step is under way or in doubt."""
        self._doubt = self._coordinator = self._step = None

    def _forget_settled(self) -> None:
        """Forget a step in doubt that a load of all shards has replaced, or that another client has settled or hidden.

        A load that failed may have been committed by all. A shard that told of a loss can finish no step after it.
        """
        doubt, loads = self._doubt, {shard.applied_load for shard in self._shards}
        told = doubt is not None and min(shard.applied_step for shard in self._shards) < doubt.step - 1
        if loads != {self._load} or told:
            self._settled()
            self._untold.forget()
            self._load = loads.pop() if len(loads) == 1 else None
        elif doubt is not None and doubt.acquisitions != self._acquisitions():
            self._settled()
            if max(self._steps_on_servers()) >= doubt.step:  # by this client, or by another one
                self._untold.add(doubt)

    def _attach_missing(self, deadline: Deadline) -> None:
        """Attach the shards whose streams are not attached, and make good what their servers have lost."""
        if missing := [shard for shard in self._shards if not shard.is_ready]:
            fan_out([functools.partial(shard.make_good, deadline) for shard in missing])

    def _steps_on_servers(self) -> list[int]:
        return [shard.step_on_server for shard in self._shards]

    def _acquisitions(self) -> int:
        return sum(shard.link.hold.acquisitions for shard in self._shards)

    def _each(self, call: Callable[[Shard], _T]) -> list[_T]:
        return fan_out([functools.partial(call, shard) for shard in self._shards])
