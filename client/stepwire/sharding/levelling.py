"""Loads into all shards: afterwards these are of one load, and at one step."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from stepwire.connection.retry import Deadline
from stepwire.errors import StateChangedError, StepMismatchError
from stepwire.links.link import Load
from stepwire.sharding.fan_out import fan_out
from stepwire.sharding.shard import Shard

__all__ = ["load_all"]


def load_all(shards: Sequence[Shard], load: Load, deadline: Deadline, *, together: bool) -> None:
    """Load all shards, and bring them to one step.

    Of several workers others may step or load some shards meanwhile. Then the load is made again, under a later number.
    The workers rest as soon as the first shard has it: they neither step nor pull shards of different loads.

    Args:
        shards: the shards.
        load: the load; one without a step brings all shards to the latest step of any.
        deadline: the deadline of everything.
        together: the session has several workers.

    Raises:
        StepMismatchError: its step would go back; or workers that do not rest stepped meanwhile, each time.
        StepwireError: as `Shard.load`; some shards may be loaded.
    """
    if not together or load.as_one:
        _attach(shards, deadline)
        if load.step is None:
            step = _uneven_step(shards, deadline) if together else max(shard.step_on_server for shard in shards)
            load = load._replace(step=step)
        # A load of all workers has the number that this one knows to be next: whoever took it has made the load.
        number = max(shard.applied_load for shard in shards) + 1 if load.as_one else _next(shards)
        _load(shards, load, number, deadline)
        return
    refused: list[StepMismatchError] = []

    def attempt(left: Deadline) -> None:
        _attach(shards, left)
        if refused:
            shards[0].load(load, _next(shards), left)
        step = max(_steps(shards, left)) if load.step is None else load.step
        try:
            _load_in_turn(shards, load._replace(step=step), left)
        except StepMismatchError as error:
            if load.step is not None or error.metadata.get("field") != "open.step":
                raise
            refused.append(error)
            raise StateChangedError(f"another worker stepped while the state was loaded: {error}") from error

    try:
        shards[0].link.retry.call(attempt, deadline)
    except StateChangedError:
        if not refused:
            raise
        raise refused[-1] from None


def _steps(shards: Sequence[Shard], deadline: Deadline) -> set[int]:
    """Ask the servers for the steps of several workers: a client knows those of its own contributions alone."""
    return {shard.info(deadline).applied_step for shard in shards}


def _uneven_step(shards: Sequence[Shard], deadline: Deadline) -> int | None:
    """Return the step for shards that differ in theirs; None where they do not, and other workers may step on."""
    steps = _steps(shards, deadline)
    return max(steps) if len(steps) > 1 else None


def _attach(shards: Sequence[Shard], deadline: Deadline) -> None:
    """Learn the numbers of shards that nobody can tell without their servers."""
    fan_out([functools.partial(shard.attach, deadline) for shard in shards if not shard.is_certain])


def _next(shards: Sequence[Shard]) -> int:
    return max(shard.load_on_server for shard in shards) + 1


def _load_in_turn(shards: Sequence[Shard], load: Load, deadline: Deadline) -> None:
    """Load all shards under a number that no other load has anywhere: the first shard gives it to one worker alone."""
    number = _next(shards)
    _load(shards[:1], load, number, deadline)
    _load(shards[1:], load, number, deadline)


def _load(shards: Sequence[Shard], load: Load, number: int, deadline: Deadline) -> None:
    fan_out([functools.partial(shard.load, load, number, deadline) for shard in shards])
