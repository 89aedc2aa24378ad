"""The step that a load without a step of its own brings all shards to."""

from __future__ import annotations

from collections.abc import Sequence

from stepwire.connection.retry import Deadline
from stepwire.sharding.shard import Shard

__all__ = ["level_of"]


def level_of(shards: Sequence[Shard], deadline: Deadline, *, together: bool) -> int | None:
    """Return the step to set in all shards; None to leave each at its own.

    With several workers a client numbers its own contributions, and knows the steps of the others from the servers
    alone. Where all shards are at one step they stay there, since another worker may be making the next one.

    Args:
        shards: the shards.
        deadline: the deadline of the questions.
        together: the session has several workers.

    Raises:
        StepwireError: as `Shard.info`.
    """
    if not together:
        return max(shard.step_on_server for shard in shards)
    steps = {shard.info(deadline).applied_step for shard in shards}
    return max(steps) if len(steps) > 1 else None
