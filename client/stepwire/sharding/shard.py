"""One shard: a session like any other, whose tensors are slices, and which says so where its server cannot."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stepwire.arrays.packing import Flat
from stepwire.arrays.trees import Structure
from stepwire.connection.channel import Calls
from stepwire.connection.retry import Deadline
from stepwire.connection.stream import AttachedStream
from stepwire.errors import StepwireError
from stepwire.results import SessionInfo
from stepwire.session import Session
from stepwire.sharding.coordinator import Coordinator
from stepwire.sharding.partition import Share
from stepwire.sharding.slice_names import Origin, origin_of
from stepwire.steps.call import OnTensor, StepCall
from stepwire.transports.route import Router
from stepwire.v1 import session_pb2, state_pb2, step_pb2
from stepwire.wire.dtypes import INT8

__all__ = ["Shard"]

_LEAST_SECONDS = 1e-3


class Shard(Session):
    """The session of one shard.

    Attributes:
        share: what of the whole it holds.
        rank: which of the shards it is.
        place: it and its server, for messages.
        router: finds ways to its server.
        message: what its server said of it when it was made or found.
    """

    def __init__(
        self,
        calls: Calls,
        router: Router,
        message: session_pb2.Session,
        token: int,
        chunk_bytes: int,
        *,
        structure: Structure,
        error_feedback: bool = False,
    ) -> None:
        """Speak for a session whose place among the shards `belongs` tells."""
        super().__init__(calls, router, message, token, chunk_bytes, structure=structure, error_feedback=error_feedback)
        self.router = router
        self.message = message
        self.share, self.rank, self.place = Share(()), 0, calls.target
        tensors = (tensor.spec for tensor in self._packer.layout.tensors)
        self._origins = {spec.name: origin for spec in tensors if (origin := origin_of(spec)).name != spec.name}

    def belongs(self, share: Share, rank: int) -> None:
        """Be told what of the whole this is."""
        self.share, self.rank, self.place = share, rank, f"shard {rank} on {self._calls.target}"

    @property
    def held(self) -> bool:
        """Its stream is attached, as far as is known."""
        return self._attachment.attached

    @property
    def step_on_server(self) -> int:
        """The last step that the server said to have applied."""
        return self._attachment.step_on_server

    def describe(self, timeout: float | None) -> SessionInfo:
        """Ask the server how this shard stands."""
        with self._told():
            return self.info(timeout=timeout)

    def hold(self, deadline: Deadline) -> AttachedStream:
        """Make sure of the stream, and so of what has been applied."""
        with self._lock, self._told():
            return self._repeat(self._attachment.attach, deadline)

    def take_part(
        self, call: StepCall, coordinator: Coordinator | None, on_tensor: OnTensor | None, deadline: Deadline
    ) -> step_pb2.StepResult:
        """Take this shard's part of a step of the whole, as often as it takes.

        Args:
            call: of the whole.
            coordinator: decides it together with the other shards; None where each can by itself.
            on_tensor: told the index, in the whole, of a tensor of which everything that this shard holds has arrived.
            deadline: of everything.
        """
        with self._lock, self._told():
            part = self._part(call, coordinator, on_tensor, deadline)
            try:
                result = self._repeat(lambda left: self._attachment.take_step(part, left), deadline)
            except BaseException:
                self._steps.failed(part)
                raise
            self._steps.applied(part, result)
            self._last_result = result
            return result

    def read(self, targets: Mapping[str, Flat], dtype: np.dtype[Any], deadline: Deadline) -> state_pb2.PullHeader:
        """Read this shard's part of slots of the whole into arrays of the whole."""
        with self._told():
            return self._pull({slot: self.share.of(flat) for slot, flat in targets.items()}, dtype, _left(deadline))

    def write(self, sources: Mapping[str, Flat], opening: state_pb2.LoadOpen, deadline: Deadline) -> None:
        """Load this shard's part of slots of the whole."""
        part = state_pb2.LoadOpen()
        part.CopyFrom(opening)
        if opening.tensor_steps:
            part.tensor_steps[:] = [opening.tensor_steps[piece.tensor] for piece in self.share.slices]
        with self._told():
            self._load({slot: self.share.of(flat) for slot, flat in sources.items()}, part, _left(deadline))

    def _part(
        self, call: StepCall, coordinator: Coordinator | None, on_tensor: OnTensor | None, deadline: Deadline
    ) -> StepCall:
        slices, commit = self.share.slices, step_pb2.StepCommit()
        if (
            coordinator is not None and coordinator.decision is not None
        ):  # of an earlier call, which other shards have followed
            commit.CopyFrom(coordinator.decision.commit)
        begin = step_pb2.StepBegin()
        begin.CopyFrom(call.begin)
        begin.epoch = self._attachment.epoch
        begin.missing_tensors[:] = sorted(self.share.indices(call.begin.missing_tensors))
        begin.reply.first[:] = self.share.indices(call.begin.reply.first)
        begin.reply.ClearField("base")
        call.bring()  # what lies on a device is cut on the host
        return dataclasses.replace(
            call,
            begin=begin,
            gradients=self.share.of(call.gradients),
            targets=self.share.of(call.targets) if call.wants_answer else (),
            missing=frozenset(self.share.indices(call.missing)),
            views=None,
            feedback=self._steps.feedback if call.gradient_dtype == INT8 else None,
            held=None if call.held is None else self._steps.base(begin),
            on_tensor=None if on_tensor is None else lambda index: on_tensor(slices[index].tensor),
            decide=None if coordinator is None else lambda staged: coordinator.decide(self.rank, staged, deadline),
            commit=commit,
            on_device={},
        )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say in every error which shard it is about, and name its tensors as the user does."""
        try:
            yield
        except StepwireError as error:
            raise self._renamed(error) from error

    def _renamed(self, error: StepwireError) -> StepwireError:
        text, metadata = str(error), {**error.metadata, "shard": self.place}
        for name, origin in self._origins.items():
            text = text.replace(name, origin.name)
        if (part := self._origins.get(metadata.get("tensor", ""))) is not None:
            metadata |= _whole_place(metadata, part)
        return type(error)(
            f"{text} ({self.place})",
            reason=error.reason,
            metadata=metadata,
            retry_after_seconds=error.retry_after_seconds,
        )


def _whole_place(metadata: Mapping[str, str], origin: Origin) -> dict[str, str]:
    found = {"tensor": origin.name}
    if "element" in metadata:
        found["element"] = str(int(metadata["element"]) + origin.begin)
    return found


def _left(deadline: Deadline) -> float:
    return max(deadline.remaining(), _LEAST_SECONDS)
