"""A contribution in doubt on all shards: in their open rounds, or in none of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from stepwire.connection.retry import Deadline
from stepwire.errors import StateChangedError
from stepwire.sharding.coordinator import Abandoned, Bounds, Coordinator
from stepwire.sharding.fan_out import fan_out
from stepwire.sharding.mismatches import half_counted
from stepwire.sharding.shard import Shard

__all__ = ["await_open_rounds"]


def await_open_rounds(shards: Sequence[Shard], step: int, bounds: Bounds | None, deadline: Deadline) -> None:
    """Wait for the end of the rounds that have a contribution; `step_on_server` of each shard tells then.

    Rounds of two phases, those with `bounds`, are decided here too, if nobody did yet: from the checks of all shards.

    Raises:
        StepMismatchError: only some of the open rounds have the contribution.
        StepwireError: the failure of a shard; the outcome is as unknown as before.
    """

    def attempt(left: Deadline) -> None:
        coordinator = None if bounds is None else Coordinator(step, len(shards), bounds)
        absent: list[Shard] = []

        def ask(shard: Shard) -> None:
            found = shard.await_open_round(step, coordinator, left)
            if not found:
                absent.append(shard)
            if coordinator is not None and not (
                found and coordinator.decision
            ):  # who waits for its check, waits in vain
                coordinator.abandon()

        try:
            asked = [functools.partial(ask, shard) for shard in shards]
            fan_out(asked) if coordinator is None else fan_out(asked, coordinator.abandon)
        except Abandoned as given_up:
            if given_up.cause is not None:
                raise given_up.cause from None
            if absent:
                raise half_counted(step) from None
            raise StateChangedError(f"contribution {step}: another worker's decision is on its way") from None

    shards[0].link.retry.call(attempt, deadline)
