"""The hold on the slots of all shards, as one: all attached, all at the same step, and stepped together."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

from stepwire.connection.retry import Deadline
from stepwire.connection.stream import AttachedStream
from stepwire.errors import StepMismatchError, UnsupportedFeatureError
from stepwire.links.remote import Attachment
from stepwire.sharding.combine import combined
from stepwire.sharding.coordinator import Abandoned, Bounds, Coordinator
from stepwire.sharding.fan_out import FanOut
from stepwire.sharding.shard import Shard
from stepwire.steps.call import OnTensor, StepCall
from stepwire.v1 import step_pb2

__all__ = ["Holds"]


class Holds(Attachment):
    """Holds the slots of several sessions that are one model. Its session serialises its calls.

    Its token is always 0: so its session attaches before each step, which costs nothing where all streams are up, and
    says where the shards are if they are not at one step.
    """

    def __init__(self, shards: Sequence[Shard], fan_out: FanOut, bounds: Bounds | None, *, limited: bool) -> None:
        """Hold what the shards hold.

        Args:
            shards: in order.
            fan_out: a thread for each.
            bounds: what the gradient of the whole is judged by; None where each shard can judge by itself.
            limited: elements are clipped by value.
        """
        self.token = self.epoch = self.applied_load = 0
        self.in_doubt = False
        self.shared = None
        self._shards = shards
        self._crew = fan_out
        self._bounds = bounds
        self._limited = limited
        self._begun: int | None = None
        self._ballot: Coordinator | None = None
        steps = [shard.applied_step for shard in shards]
        self.applied_step = self.step_on_server = min(steps)

    def level(self) -> int:
        """Return the step that all shards are at, or are to be brought to by repeating a step that failed.

        Raises:
            StepMismatchError: they are at different steps, and this client does not know how that came.
        """
        steps = [shard.applied_step for shard in self._shards]
        if len(set(steps)) == 1:
            return steps[0]
        begun = self._begun
        if begun is not None and set(steps) <= {begun - 1, begun}:
            return begun - 1
        raise self._uneven(steps)

    def attach(self, deadline: Deadline) -> AttachedStream:
        """Attach what is not attached, and learn where the shards are.

        Raises:
            StepMismatchError: at different steps.
            StepwireError: a server refused or cannot be reached.
        """
        self._hold(deadline)
        self.applied_step = self.step_on_server = self.level()
        return self._shards[0].hold(deadline)

    def detach(self) -> None:
        """Drop all streams; the slots stay ours until another client takes them."""
        for shard in self._shards:
            shard.detach()

    def loaded(self, load: int, applied_step: int) -> None:
        """Forget the step that failed, if there is one: what was loaded is in its place."""
        del load
        self._begun = self._ballot = None
        self.applied_step = self.step_on_server = applied_step

    def take_step(self, call: StepCall, deadline: Deadline) -> step_pb2.StepResult:
        """Take a step on all shards, each as often as it takes, and combine what they answer.

        Raises:
            UnsupportedFeatureError: the gradient is still being made.
            StepMismatchError: a shard moved without this client.
            StepwireError: what one of them failed for; the step may have been applied on others, and is finished by
                its number.
        """
        if call.feed is not None:  # whose parts would be cut before they are there
            raise UnsupportedFeatureError(
                "feed: gradients that are made while they are sent go to one server; give `step` the whole gradient",
                metadata={"field": "feed", "feature": "feed"},
            )
        self._hold(deadline)
        coordinator = self._ballot_of(call.begin.step)
        self._begun, self._ballot = call.begin.step, coordinator
        told = [None] * len(self._shards) if call.on_tensor is None else _gathered(self._shards, call.on_tensor)
        parts = [
            functools.partial(shard.take_part, call, coordinator, notify, deadline)
            for shard, notify in zip(self._shards, told, strict=True)
        ]
        try:
            results = self._crew.each(parts, lambda: coordinator.abandon() if coordinator is not None else None)
        except Abandoned as given_up:
            if given_up.cause is None:  # the user's patience ended
                raise
            raise given_up.cause from None
        self._begun = self._ballot = None
        self.applied_step = self.step_on_server = call.begin.step
        return combined(results, None if coordinator is None else coordinator.decision, limited=self._limited)

    def _hold(self, deadline: Deadline) -> None:
        """Attach what is not attached."""
        self._crew.each([functools.partial(shard.hold, deadline) for shard in self._shards if not shard.held])

    def _ballot_of(self, step: int) -> Coordinator | None:
        """Return what decides a step: what has been decided already where a shard has followed it, or a new vote.

        Raises:
            StepMismatchError: a shard moved without this client.
        """
        steps = [shard.step_on_server for shard in self._shards]
        if not set(steps) <= {step - 1, step}:
            raise self._uneven(steps)
        if step not in steps:
            return None if self._bounds is None else Coordinator(step, len(self._shards), self._bounds)
        decided = self._ballot is not None and self._ballot.decision is not None
        if self._begun != step or not (self._bounds is None or decided):
            raise self._uneven(steps)
        return self._ballot

    def _uneven(self, steps: Sequence[int]) -> StepMismatchError:
        where = ", ".join(f"{shard.place} is at step {step}" for shard, step in zip(self._shards, steps, strict=True))
        return StepMismatchError(
            f"the shards of this session were stepped by another client, or their client ended between two of them: "
            f"{where}. Load one state into all of them with load_state, its step not below {max(steps)}, or into a new "
            "session",
            metadata={"steps": ",".join(map(str, steps)), "expected_step": min(steps) + 1, "actual_step": max(steps)},
        )


def _gathered(shards: Sequence[Shard], notify: OnTensor) -> list[OnTensor]:
    """Return what each shard is to call, so that `notify` is told when all have what they hold of a tensor.

    One at a time; again where the answer of a shard is repeated.
    """
    awaited: dict[int, set[int]] = {}
    for shard in shards:
        for piece in shard.share.slices:
            awaited.setdefault(piece.tensor, set()).add(shard.rank)
    lock = threading.Lock()

    def arrived(rank: int, tensor: int) -> None:
        with lock:
            awaited[tensor].discard(rank)
            if not awaited[tensor]:
                notify(tensor)

    return [functools.partial(arrived, shard.rank) for shard in shards]
