"""One shard: a link to its session, whose tensors are ranges, and errors that say which shard they are about."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwire.arrays.packing import Flat
from stepwire.arrays.rows import PulledRows, RowTarget
from stepwire.connection.retry import Deadline
from stepwire.errors import SessionMovedError, StepwireError
from stepwire.links.link import Load
from stepwire.links.remote import RemoteLink
from stepwire.results import SessionInfo
from stepwire.sharding.coordinator import Coordinator
from stepwire.sharding.partition import Partition, ShardRanges, TensorRange
from stepwire.sharding.range_names import Origin, origin_of
from stepwire.sharding.rows import own_gradients, own_targets, read_rows
from stepwire.steps.call import Decide, OnTensor, StepCall
from stepwire.v1 import state_pb2, step_pb2
from stepwire.wire.dtypes import INT8

__all__ = ["Shard", "carry_over", "gathered"]


class Shard:
    """One shard of a sharded session.

    Attributes:
        link: the link to the shard's session.
        ranges: the ranges that the shard holds.
        rank: the position of the shard among the shards.
        place: the shard and its server, for messages.
    """

    def __init__(self, link: RemoteLink, ranges: ShardRanges, rank: int) -> None:
        """Step the session of a link as one shard of a whole."""
        self.link = link
        self.ranges = ranges
        self.rank = rank
        self.place = f"shard {rank} on {link.target}"
        self._layout = link.description.packer.layout
        self._has_several = link.description.message.config.aggregation.workers > 1
        tensors = (tensor.spec for tensor in self._layout.tensors)
        self._origins = {spec.name: origin for spec in tensors if (origin := origin_of(spec)).name != spec.name}

    @classmethod
    def whole(cls, link: RemoteLink) -> Shard:
        """Return the session of a link as the only shard of its model."""
        return cls(link, Partition.read([link.description.packer.layout]).shards[0], 0)

    @property
    def is_ready(self) -> bool:
        """Tell whether a step can follow, once one under way is over: a stream is attached, and no loss is known."""
        with self.link.lock:
            return self.link.hold.attached and not self.link.hold.has_lost

    @property
    def applied_step(self) -> int:
        """The last step known to be applied."""
        return self.link.applied_step

    @property
    def contribution(self) -> int:
        """With several workers, the number of this one's last contribution."""
        return self.link.hold.applied_step

    @property
    def begins_anew(self) -> bool:
        """Tell whether the next contribution may have any later number, once a step under way is over."""
        with self.link.lock:
            return self.link.hold.begins_anew

    @property
    def step_on_server(self) -> int:
        """The last applied step, as the server said itself, once a step under way is over."""
        with self.link.lock:
            return self.link.hold.step_on_server

    @property
    def applied_load(self) -> int:
        """The last load known to be committed, once a step under way is over."""
        with self.link.lock:
            return self.link.hold.applied_load

    @property
    def load_on_server(self) -> int:
        """The last load that this client has heard of, once a step under way is over."""
        with self.link.lock:
            return self.link.hold.load_on_server

    @property
    def is_certain(self) -> bool:
        """Tell whether the numbers of the shard are known, once a step under way is over."""
        with self.link.lock:
            return self.link.hold.is_certain

    def attach(self, deadline: Deadline, *, transport: str | None = None, take_over: bool = False) -> None:
        """Attach the stream, and so learn the applied step; see `SessionLink.attach`."""
        with self.link.lock, self._named(deadline):
            self.link.attach(deadline, transport=transport, take_over=take_over)

    def make_good(self, deadline: Deadline) -> None:
        """Attach the stream if need be, and make good what the server has lost; see `RemoteLink.make_good`."""
        with self.link.lock, self._named(deadline):
            self.link.make_good(deadline)

    def make_sure(self, deadline: Deadline) -> None:
        """See `SessionLink.make_sure`."""
        with self._named(deadline):
            self.link.make_sure(deadline)

    def step(
        self, call: StepCall, coordinator: Coordinator | None, on_tensor: OnTensor | None, deadline: Deadline
    ) -> step_pb2.StepResult:
        """Apply this shard's ranges of a step of the whole, by its number.

        Args:
            call: the step of the whole.
            coordinator: the coordinator of all shards; None if each shard decides by itself.
            on_tensor: the function for each tensor whose range in this shard has arrived, by its index in the whole.
            deadline: the deadline of everything.

        Raises:
            StepwireError: as `SessionLink.step`, with the shard named.
        """
        with self.link.lock, self._named(deadline):
            own = self._own(call, coordinator, on_tensor, deadline)
            try:
                result = self.link.step_by_number(own, deadline)
                if coordinator is not None:
                    coordinator.follow(result)
                return result
            finally:
                call.sent = call.sent or own.sent
                if own.trace is not None:
                    own.trace.end()

    def await_open_round(self, step: int, coordinator: Coordinator | None, deadline: Deadline) -> bool:
        """Wait for the round that has a contribution in doubt; see `RemoteLink.await_open_round`."""
        with self.link.lock, self._named(deadline):
            return self.link.await_open_round(step, self._decide(coordinator, deadline), deadline)

    def resolve(self, *, applied: bool) -> None:
        """Adopt the outcome of a step in doubt, as the server said it."""
        hold, feedback = self.link.hold, self.link.carry.feedback
        hold.applied_step = hold.step_on_server
        if feedback is not None:
            if applied:
                feedback.accept()
            else:
                feedback.discard()

    def pull(self, targets: Mapping[str, Flat], dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """Read this shard's ranges of slots into arrays of the whole; maxima that the shard has not are zeros."""
        own = {slot: self.ranges.of(flat) for slot, flat in targets.items()}
        for slot in targets.keys() - set(self.link.description.slots):
            for target in own.pop(slot):
                target.fill(0)
        with self._named(deadline):
            return self.link.pull(own, dtype, deadline)

    def pull_rows(self, rows: PulledRows, dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """Read this shard's rows of tables into the places of the whole; the shard has a table, perhaps another one."""
        with self._named(deadline):
            return self.link.pull_rows(read_rows(self.ranges, self._layout, rows, dtype), dtype, deadline)

    def targets(self, targets: Sequence[RowTarget]) -> tuple[RowTarget, ...]:
        """Return the places of the rows of a reply that this shard sends."""
        return own_targets(self.ranges, self._layout, targets)

    def load(self, load: Load, number: int, deadline: Deadline) -> None:
        """Load this shard's ranges of slots of the whole, until the shard's last load has a number.

        That is once. A single worker's loads leave no number out, so it is once more for each load that other shards
        committed without this one.

        Raises:
            StateChangedError: another worker's load has one of these numbers.
            StepwireError: as `RemoteLink.load`.
        """
        hold = self.link.hold
        with self.link.lock, self._named(deadline):
            while hold.load_on_server < number:
                own = number if self._has_several else hold.load_on_server + 1
                self.link.load(self._own_load(load)._replace(number=own), deadline)

    def initialize(self, load: Load, deadline: Deadline) -> None:
        """Load this shard's ranges of the parameters, if its session has none yet."""
        with self.link.lock, self._named(deadline):
            self.link.initialize(self._own_load(load), deadline)

    def ask(self, method: str, request: Any, response: Any, deadline: Deadline) -> Any:
        """Make a unary call about this shard's session."""
        own = type(request)()
        own.CopyFrom(request)
        with self._named(deadline):
            return self.link.ask(method, own, response, deadline)[0]

    def info(self, deadline: Deadline) -> SessionInfo:
        """Ask the server for the state of this shard; its tables have their names in the whole."""
        with self._named(deadline):
            info = self.link.info(deadline)
        whole = {name: origin.name for name, origin in self._origins.items()}
        tables = (dataclasses.replace(table, name=whole.get(table.name, table.name)) for table in info.tables)
        return dataclasses.replace(info, tables=tuple(tables))

    def residuals(self) -> Iterator[tuple[TensorRange, npt.NDArray[np.float32]]]:
        """Yield each range with its residual, a view of the feedback's; nothing without error feedback."""
        if (feedback := self.link.carry.feedback) is not None:
            for each, tensor in zip(self.ranges.ranges, self.link.description.packer.layout.tensors, strict=True):
                yield each, feedback.residual[tensor.offset : tensor.end]

    def _own_load(self, load: Load) -> Load:
        tensors, slots = [each.tensor for each in self.ranges.ranges], self.link.description.slots
        steps = [load.tensor_steps[tensor] for tensor in tensors if load.tensor_steps]
        scalars = [load.tensor_scalars[tensor] for tensor in tensors if load.tensor_scalars]
        sources = {slot: self.ranges.of(flat) for slot, flat in load.sources.items() if slot in slots}
        rows = None if load.rows is None else own_gradients(self.ranges, self._layout, load.rows)
        return load._replace(sources=sources, tensor_steps=steps, tensor_scalars=scalars, rows=rows)

    def _own(
        self, call: StepCall, coordinator: Coordinator | None, on_tensor: OnTensor | None, deadline: Deadline
    ) -> StepCall:
        """Return the call of this shard."""
        ranges, carry, commit = self.ranges.ranges, self.link.carry, step_pb2.StepCommit()
        if coordinator is not None and coordinator.decision is not None:  # of an earlier call: other shards followed it
            commit.CopyFrom(coordinator.decision.commit)
        begin = step_pb2.StepBegin()
        begin.CopyFrom(call.begin)
        rows = own_gradients(self.ranges, self._layout, call.rows) if call.rows else ()
        del begin.tables[:]
        for table in rows:
            begin.tables.add(tensor=table.tensor, entries=len(table.indices))
        begin.missing_tensors[:] = sorted(self.ranges.indices(call.begin.missing_tensors))
        begin.reply.first[:] = self.ranges.indices(call.begin.reply.first)
        begin.reply.ClearField("base")
        call.bring()  # gradients on a device are split on the host
        return dataclasses.replace(
            call,
            recognised=None,
            begin=begin,
            gradients=self.ranges.of(call.gradients),
            targets=self.ranges.of(call.targets) if call.wants_reply else (),
            missing=frozenset(self.ranges.indices(call.missing)),
            views=None,
            feedback=carry.feedback if call.gradient_dtype == INT8 else None,
            patched=None if call.patched is None else carry.patched(begin),
            on_tensor=None if on_tensor is None else lambda index: on_tensor(ranges[index].tensor),
            decide=self._decide(coordinator, deadline),
            commit=commit,
            on_device={},
            rows=rows,
            row_targets=self.targets(call.row_targets) if call.row_targets else (),
            trace=None if call.trace is None else call.trace.part(begin, self.link.target),
        )

    def _decide(self, coordinator: Coordinator | None, deadline: Deadline) -> Decide | None:
        """Return the way to the decision of all shards."""
        return None if coordinator is None else lambda check: coordinator.decide(self.rank, check, deadline)

    @contextlib.contextmanager
    def _named(self, deadline: Deadline) -> Iterator[None]:
        """Say in every error which shard the error is about, and name its tensors as the user does.

        A session that has moved has moved with all its shards, so their calls end too.
        """
        try:
            yield
        except StepwireError as error:
            if isinstance(error, SessionMovedError):
                deadline.end()
            raise self._renamed(error) from error

    def _renamed(self, error: StepwireError) -> StepwireError:
        text, metadata = str(error), {**error.metadata, "shard": self.place}
        for name, origin in self._origins.items():
            text = text.replace(name, origin.name)
        if (found := self._origins.get(metadata.get("tensor", ""))) is not None:
            metadata |= _in_the_whole(metadata, found)
        return type(error)(
            f"{text} ({self.place})",
            reason=error.reason,
            metadata=metadata,
            retry_after_seconds=error.retry_after_seconds,
        )


def carry_over(former: Sequence[Shard], new: Sequence[Shard]) -> None:
    """Have the shards of a model go on where its former ones stopped: with what these knew, and their residuals."""
    holds = [shard.link.hold for shard in former]
    for shard in new:
        shard.link.hold.succeed(holds)
    _carry_residuals(former, new)


def _carry_residuals(former: Sequence[Shard], new: Sequence[Shard]) -> None:
    """Carry the encoding errors of gradients over to the ranges that other shards have of the same model."""
    kept: dict[int, list[tuple[int, int, npt.NDArray[np.float32]]]] = {}
    for shard in former:
        for each, residual in shard.residuals():
            kept.setdefault(each.tensor, []).append((each.begin, each.end, residual))
    for shard in new:
        for each, residual in shard.residuals():
            for begin, end, values in kept.get(each.tensor, ()):
                low, high = max(begin, each.begin), min(end, each.end)
                if low < high:
                    residual[low - each.begin : high - each.begin] = values[low - begin : high - begin]


def gathered(shards: Sequence[Shard], call: StepCall) -> list[OnTensor]:
    """Return a function for each shard, so that `call.on_tensor` is called once all have their ranges of a tensor.

    The calls come one at a time, and again if the reply of a shard is repeated. No shard is awaited that has no rows of
    a table.
    """
    awaited: dict[int, set[int]] = {}
    for shard in shards:
        idle = {target.tensor for target in shard.targets(call.row_targets) if not len(target.indices)}
        for own, each in enumerate(shard.ranges.ranges):
            if own not in idle:
                awaited.setdefault(each.tensor, set()).add(shard.rank)
    lock, notify = threading.Lock(), call.on_tensor
    assert notify is not None

    def arrived(rank: int, tensor: int) -> None:
        with lock:
            awaited[tensor].discard(rank)
            if not awaited[tensor]:
                notify(tensor)

    return [functools.partial(arrived, shard.rank) for shard in shards]


def _in_the_whole(metadata: Mapping[str, str], origin: Origin) -> dict[str, str]:
    found = {"tensor": origin.name}
    if "element" in metadata:
        found["element"] = str(int(metadata["element"]) + origin.begin)
    return found
