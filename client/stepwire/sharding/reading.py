"""Shards that are read as of one moment: again, while another client steps or loads them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from stepwire.connection.retry import Deadline
from stepwire.errors import DeadlineExceededError, StateChangedError, StepMismatchError
from stepwire.sharding.fan_out import fan_out
from stepwire.sharding.mismatches import half_applied, half_loaded, read_at, uneven
from stepwire.sharding.shard import Shard
from stepwire.steps.doubt import Doubt
from stepwire.v1 import state_pb2

__all__ = ["AlikeReader", "own_failure"]

Cause = Callable[[Sequence[int], Sequence[int]], StepMismatchError | None]
"""The error of shards that were read at some steps and loads because a call of this client failed; None for others."""


def own_failure(
    shards: Sequence[Shard], doubt: Doubt | None, steps: Sequence[int], loads: Sequence[int]
) -> StepMismatchError | None:
    """Return the error of shards that were read unlike because a step or a load of this client failed.

    Only this client levels such shards, so reading them again is in vain. The result is None if another client may be
    stepping or loading.
    """
    holds = all(shard.is_certain for shard in shards)  # and has found the shards as they were read, or not
    if len(set(loads)) > 1:
        in_doubt = any(shard.link.hold.load_in_doubt for shard in shards)
        if in_doubt or holds and list(loads) == [shard.applied_load for shard in shards]:
            return half_loaded(shards, loads)
    elif doubt is not None and set(steps) <= {doubt.step - 1, doubt.step}:
        return half_applied(shards, doubt.step, steps)
    elif holds and list(steps) == [shard.step_on_server for shard in shards]:
        return uneven(shards, steps)
    return None


class AlikeReader:
    """Reads shards until all of them are at one load, and at one step."""

    def __init__(self, shards: Sequence[Shard], cause: Cause) -> None:
        """Read some shards; `cause` tells whether reading them again is in vain."""
        self._shards = shards
        self._cause = cause
        self._seen: list[StepMismatchError] = []

    def read(
        self, read: Callable[[Shard, Deadline], state_pb2.PullHeader], deadline: Deadline, *, together: bool
    ) -> list[state_pb2.PullHeader]:
        """Read each shard, and return the headers in order.

        Args:
            read: reads one shard.
            deadline: the deadline of everything.
            together: the shards are to be at one step too; False for those of several workers.

        Raises:
            StepMismatchError: the shards stayed at different steps or loads; at once if a failed call is the cause.
            StepwireError: as `Session.pull`.
        """
        attempt = functools.partial(self._attempt, read, together=together)
        try:
            return self._shards[0].link.retry.call(attempt, deadline)
        except (StateChangedError, DeadlineExceededError):
            if not self._seen:
                raise
            raise self._seen[-1] from None

    def _attempt(
        self, read: Callable[[Shard, Deadline], state_pb2.PullHeader], left: Deadline, *, together: bool
    ) -> list[state_pb2.PullHeader]:
        headers = fan_out([functools.partial(read, shard, left) for shard in self._shards])
        steps, loads = [header.step for header in headers], [header.load for header in headers]
        if len(set(loads)) > 1:
            self._seen.append(half_loaded(self._shards, loads))
        elif len(set(steps)) > 1 and together:
            self._seen.append(read_at(steps, len(self._seen) + 1))
        else:
            return headers
        if (cause := self._cause(steps, loads)) is not None:
            raise cause
        raise StateChangedError(f"the shards were read at different steps {steps}, or of different loads {loads}")
