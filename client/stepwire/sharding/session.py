"""The client's end of a model that is cut over several sessions: used as one session is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from stepwire.arrays.packing import Arrays, Flat
from stepwire.arrays.trees import Structure, Tree
from stepwire.connection.retry import Deadline
from stepwire.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    StateChangedError,
    StepMismatchError,
    UnsupportedFeatureError,
)
from stepwire.layout import Layout
from stepwire.optimizers.gradient_treatment import treatment_from_wire
from stepwire.results import SessionInfo, TransportChoice
from stepwire.session import Session
from stepwire.sharding.coordinator import Bounds
from stepwire.sharding.fan_out import FanOut
from stepwire.sharding.link import Holds
from stepwire.sharding.partition import Partition
from stepwire.sharding.shard import Shard
from stepwire.transports.available import TRANSPORTS
from stepwire.v1 import session_pb2, state_pb2
from stepwire.wire.messages import layout_to_wire, spec_to_wire

__all__ = ["ShardedSession"]

_T = TypeVar("_T")


class ShardedSession(Session):
    """One optimizer over one model, cut over several sessions. Made by `ShardedClient`.

    It is used as a `Session` is, and gives the same parameters, bit for bit. What is different:

    - A load that fails may have been done on some servers: load again.
    - A step that fails may have been applied on some servers: take it again with the same gradients. A client that
      ends in between leaves shards at different steps; `applied_step`, steps and pulls then raise StepMismatchError,
      until a state is loaded into all.
    - `on_tensor` is called in the threads of shards, one at a time.

    Attributes:
        session_id: the ids of all shards in order, joined by commas.
    """

    def __init__(self, shards: Sequence[Shard], partition: Partition, *, structure: Structure) -> None:
        """Speak for sessions that their servers described.

        Args:
            shards: in order.
            partition: what each holds.
            structure: what parameters are pulled in.

        Raises:
            InvalidRequestError: the sessions are not those of one model.
        """
        messages = [shard.message for shard in shards]
        _check_alike(messages)
        first, whole = shards[0], _whole(messages, partition.layout)
        super().__init__(first._calls, first.router, whole, 0, first._chunk_bytes, structure=structure)
        for rank, (shard, share) in enumerate(zip(shards, partition.shares, strict=True)):
            shard.belongs(share, rank)
        self._shards = tuple(shards)
        self._partition = partition
        self._crew = FanOut(len(shards))
        self._attachment = self._holds = Holds(
            shards, self._crew, _bounds(whole), limited=whole.config.gradient.HasField("clip_grad_value")
        )

    @property
    def applied_step(self) -> int:
        """The last step known to be applied on all shards; the next `step` is the one after it.

        Raises:
            StepMismatchError: the shards are at different steps, and not because a step of this client failed.
        """
        return self._holds.level()

    @property
    def shards(self) -> tuple[Session, ...]:
        """The sessions of the shards, for what they have singly: `info`, `transport`, `last_result`."""
        return self._shards

    @property
    def transport(self) -> TransportChoice | None:
        """The least of the shards' transports; None before all streams are attached."""
        choices = [shard.transport for shard in self._shards]
        known = [choice for choice in choices if choice is not None]
        if len(known) < len(choices):
            return None
        return max(known, key=lambda choice: TRANSPORTS.index(choice.name))

    def attach(self, *, transport: str | None = None, take_over: bool = False, timeout: float | None = None) -> None:
        """Attach the streams of all shards now; see `Session.attach`."""
        with self._lock:
            self._each(lambda shard: shard.attach(transport=transport, take_over=take_over, timeout=timeout))

    def shared_gradients(self, *, timeout: float | None = None) -> Tree:
        """Refuse: a tensor that is cut lies in several memories.

        Raises:
            UnsupportedFeatureError: always.
        """
        raise _unshared()

    def shared_parameters(self, *, private: bool = False, timeout: float | None = None) -> Tree:
        """Refuse, as `shared_gradients` does.

        Raises:
            UnsupportedFeatureError: always.
        """
        raise _unshared()

    def info(self, *, timeout: float | None = None) -> SessionInfo:
        """Ask the servers how the session stands.

        Returns:
            Steps, `ready`, `attached` and `expire_time` as of the shard that has the least; bytes added up.

        Raises:
            SessionNotFoundError: a shard is gone.
        """
        parts = self._each(lambda shard: shard.describe(timeout))
        return SessionInfo(
            session_id=self.session_id,
            label=parts[0].label,
            epoch=max(part.epoch for part in parts),
            applied_step=min(part.applied_step for part in parts),
            durable_step=min(part.durable_step for part in parts),
            memory_bytes=sum(part.memory_bytes for part in parts),
            device=",".join(part.device for part in parts),
            ready=all(part.ready for part in parts),
            attached=all(part.attached for part in parts),
            create_time=min(part.create_time for part in parts),
            expire_time=min(part.expire_time for part in parts),
        )

    def close(self) -> None:
        """End all shards on their servers; see `Session.close`."""
        if self._queue is not None:
            self._queue.close()
        self._each(Shard.close)
        self._crew.close()

    def load_missing(self, parameters: Arrays, timeout: float | None) -> None:
        """Load parameters into the shards that have none yet."""
        sources = {"param": self._packer.ordered(parameters, "parameters")}
        unready = [shard for shard in self._shards if not shard.message.ready]
        deadline = self._calls.deadline(timeout)
        self._crew.each([functools.partial(shard.write, sources, state_pb2.LoadOpen(), deadline) for shard in unready])

    # --- what the surface of `Session` stands on ---------------------------------------------------------

    def _pull(self, targets: Mapping[str, Flat], dtype: np.dtype[Any], timeout: float | None) -> state_pb2.PullHeader:
        seen: list[list[int]] = []
        try:
            return self._repeat(lambda left: self._pull_once(targets, dtype, left, seen), self._calls.deadline(timeout))
        except (StateChangedError, DeadlineExceededError):
            if not seen:
                raise
            raise StepMismatchError(
                f"the shards were read {len(seen)} times and were at different steps, at last {seen[-1]}: another "
                "client is stepping them, or a step of theirs failed. Finish that step, or load one state into all",
                metadata={"steps": ",".join(map(str, seen[-1]))},
            ) from None

    def _pull_once(
        self, targets: Mapping[str, Flat], dtype: np.dtype[Any], deadline: Deadline, seen: list[list[int]]
    ) -> state_pb2.PullHeader:
        headers = self._each(lambda shard: shard.read(targets, dtype, deadline))
        steps = [header.step for header in headers]
        if len(set(steps)) > 1:
            seen.append(steps)
            raise StateChangedError(f"the shards were read at different steps: {steps}")
        whole = state_pb2.PullHeader(
            step=steps[0],
            epoch=max(header.epoch for header in headers),
            load=max(header.load for header in headers),
            tensor_steps=[0] * len(self._partition.layout.tensors),
            loss_scale=headers[0].loss_scale if headers[0].HasField("loss_scale") else None,
        )
        for share, header in zip(self._partition.shares, headers, strict=True):
            for piece, step in zip(share.slices, header.tensor_steps, strict=True):
                whole.tensor_steps[piece.tensor] = step
        return whole

    def _load(self, sources: Mapping[str, Flat], opening: state_pb2.LoadOpen, timeout: float | None) -> None:
        with self._lock:
            deadline = self._calls.deadline(timeout)
            self._each(lambda shard: shard.write(sources, opening, deadline))
            if opening.HasField("step"):
                self._holds.loaded(0, opening.step)
            self._steps.loaded()

    def _repeat(self, attempt: Callable[[Deadline], _T], deadline: Deadline) -> _T:
        return self._calls.retry.call(attempt, deadline)

    def _each(self, call: Callable[[Shard], _T]) -> list[_T]:
        return self._crew.each([functools.partial(call, shard) for shard in self._shards])


def _unshared() -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        "a session that is cut has no arrays in shared memory, as a tensor may lie in several; pass arrays of your own "
        "to `step`, which are copied into it",
        metadata={"field": "transport", "feature": "transport_shm"},
    )


def _whole(messages: Sequence[session_pb2.Session], layout: Layout) -> session_pb2.Session:
    """Return what one server would say of the whole."""
    whole = session_pb2.Session()
    whole.CopyFrom(messages[0])
    whole.session_id = ",".join(message.session_id for message in messages)
    whole.epoch = 0  # each shard has its own
    del whole.config.tensors[:]
    whole.config.tensors.extend(spec_to_wire(tensor.spec) for tensor in layout.tensors)
    whole.layout.CopyFrom(layout_to_wire(layout, tuple(messages[0].layout.slots)))
    return whole


def _bounds(whole: session_pb2.Session) -> Bounds | None:
    """Return what the gradient is judged by; None where each shard judges by itself."""
    gradient, groups = whole.config.gradient, whole.config.groups
    if not gradient.two_phase:
        return None
    bounds = tuple(group.clip_grad_norm if group.HasField("clip_grad_norm") else None for group in groups)
    treatment = treatment_from_wire(gradient, "gradient", group_clips=any(bounds))
    return Bounds(treatment.clip_grad_norm, bounds, treatment.clip_formula or "torch", treatment.policy)


def _check_alike(messages: Sequence[session_pb2.Session]) -> None:
    """Refuse sessions that differ in more than their tensors.

    Raises:
        InvalidRequestError: names the first that is different.
    """
    configs = []
    for message in messages:
        config = session_pb2.SessionConfig()
        config.CopyFrom(message.config)
        for field in ("tensors", "device", "lease", "label"):
            config.ClearField(field)
        configs.append(config)
    for message, config in zip(messages, configs, strict=True):
        if config != configs[0] or list(message.layout.slots) != list(messages[0].layout.slots):
            raise InvalidRequestError(
                f"session_id: {message.session_id!r} has another optimizer, other groups or other options than "
                f"{messages[0].session_id!r}; they are not the shards of one model",
                metadata={"field": "session_id"},
            )
