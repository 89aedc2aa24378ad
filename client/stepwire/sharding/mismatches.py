"""The errors of shards that are not at one step, or not of one load, with the remedy of each case."""

from __future__ import annotations

from collections.abc import Sequence

from stepwire.errors import StepMismatchError
from stepwire.sharding.shard import Shard

__all__ = ["half_applied", "half_counted", "half_loaded", "read_at", "uneven"]


def uneven(shards: Sequence[Shard], steps: Sequence[int]) -> StepMismatchError:
    """Return the error of shards at different steps, which no step in doubt of this client explains."""
    return StepMismatchError(
        f"the shards of this session were stepped by another client, or their client ended between two of them: "
        f"{_where(shards, steps)}. Load one state into all of them with load_state, its step not below {max(steps)}, "
        "or into a new session",
        metadata=_numbers(steps),
    )


def half_applied(shards: Sequence[Shard], step: int, steps: Sequence[int]) -> StepMismatchError:
    """Return the error of a step in doubt that some shards have applied."""
    return StepMismatchError(
        f"step {step} failed and was applied on some servers: {_where(shards, steps)}. Repeat it with the same "
        f"gradients, which finishes it everywhere, or load one state into all shards with load_state, its step not "
        f"below {step}; nothing else was sent",
        metadata=_numbers(steps),
    )


def half_counted(step: int) -> StepMismatchError:
    """Return the error of a contribution in doubt that the open rounds of some shards have."""
    return StepMismatchError(
        f"contribution {step} failed, and counts in the open round of some servers alone. Repeat it with the same "
        "gradients, which finishes it everywhere, or load one state into all shards with load_state; nothing else was "
        "sent",
        metadata={"step_in_doubt": step},
    )


def half_loaded(shards: Sequence[Shard], loads: Sequence[int]) -> StepMismatchError:
    """Return the error of a load that some shards have committed."""
    return StepMismatchError(
        f"a load of this session failed and was committed on some servers: {_where(shards, loads, 'load')}. Load "
        "again, which levels all shards",
        metadata={"loads": ",".join(map(str, loads))},
    )


def read_at(steps: Sequence[int], times: int) -> StepMismatchError:
    """Return the error of shards that were at different steps whenever they were read."""
    return StepMismatchError(
        f"the shards were read {times} times and were at different steps, at last {steps}: another client is stepping "
        "them, or a step of theirs failed. Finish that step, or load one state into all",
        metadata={"steps": ",".join(map(str, steps))},
    )


def _where(shards: Sequence[Shard], numbers: Sequence[int], what: str = "step") -> str:
    return ", ".join(f"{shard.place} is at {what} {number}" for shard, number in zip(shards, numbers, strict=True))


def _numbers(steps: Sequence[int]) -> dict[str, object]:
    return {"steps": ",".join(map(str, steps)), "expected_step": min(steps) + 1, "actual_step": max(steps)}
