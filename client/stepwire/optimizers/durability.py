"""The durability of a session: the record, its ranges, and its message in the contract."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal, get_args

from google.protobuf.duration_pb2 import Duration

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.hyperparameters import number, whole_number
from stepwire.v1 import session_pb2 as pb

__all__ = ["Durability", "DurabilityLevel", "durability_from_wire", "durability_to_wire"]

DurabilityLevel = Literal["memory", "checkpoint", "journal", "replicated"]

_LEVELS: Final = {
    "memory": pb.DURABILITY_MEMORY,
    "checkpoint": pb.DURABILITY_CHECKPOINT,
    "journal": pb.DURABILITY_JOURNAL,
    "replicated": pb.DURABILITY_REPLICATED,
}
_NAMES: Final[dict[int, DurabilityLevel]] = {pb.DURABILITY_UNSPECIFIED: "memory"} | {
    value: name for name, value in zip(get_args(DurabilityLevel), _LEVELS.values(), strict=True)
}
_MOST_STEPS: Final = 2**53
_MOST_SECONDS: Final = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Durability:
    """The steps of a session that survive a loss of its server.

    Attributes:
        level: `"memory"`: none. `"checkpoint"`: those up to the last checkpoint. `"journal"`: every acknowledged one.
            `"replicated"`: every acknowledged one, in the memory of a standby.
        every_steps: the number of steps between two checkpoints, ≥ 1; None counts no steps.
        every_seconds: the time between two checkpoints, > 0; None leaves it to the server.
    """

    level: DurabilityLevel = "memory"
    every_steps: int | None = None
    every_seconds: float | None = None

    @property
    def on_disk(self) -> bool:
        """The session is in the server's data directory."""
        return self.level in ("checkpoint", "journal")

    @property
    def logged(self) -> bool:
        """Every acknowledged step survives, on the disk or in the memory of a standby: it is described as a record."""
        return self.level in ("journal", "replicated")

    @classmethod
    def of(cls, value: Durability | DurabilityLevel, field: str) -> Durability:
        """Return a durability that is given whole, or by its level alone.

        Raises:
            InvalidRequestError: as `check`.
        """
        durability = value if isinstance(value, Durability) else cls(level=value)
        durability.check(field)
        return durability

    def check(self, field: str, *, times: str = "") -> None:
        """Check the values.

        Args:
            field: the path of the durability.
            times: the path of its checkpoints' times; empty for the same.

        Raises:
            InvalidRequestError: a value is out of range, or `"memory"` is to have checkpoints; the message names it.
        """
        times = times or field
        if not isinstance(self.level, str) or self.level not in _LEVELS:
            raise InvalidRequestError.of(f"{field}.level", f"{self.level!r:.80} is none of {', '.join(_LEVELS)}")
        if not self.on_disk and (self.every_steps, self.every_seconds) != (None, None):
            raise InvalidRequestError.of(times, "sessions in memory have no checkpoints; ask for another level")
        if self.every_steps is not None:
            steps = whole_number(self.every_steps, f"{times}.every_steps")
            if not 1 <= steps < _MOST_STEPS:
                raise InvalidRequestError.of(f"{times}.every_steps", f"{steps} is not in [1, 2^53)")
        if self.every_seconds is not None:
            seconds = number(self.every_seconds, f"{times}.every_seconds")
            if not 0 < seconds <= _MOST_SECONDS:
                raise InvalidRequestError.of(f"{times}.every_seconds", f"{seconds!r} is not in (0, 1e9]")


def durability_to_wire(durability: Durability, config: pb.SessionConfig) -> None:
    """Encode a durability into a session's config."""
    config.durability = _LEVELS[durability.level]
    if durability.every_steps is not None:
        config.checkpoints.every_steps = durability.every_steps
    if durability.every_seconds is not None:
        nanos = round(durability.every_seconds * 1e9)
        config.checkpoints.every.CopyFrom(Duration(seconds=nanos // 10**9, nanos=nanos % 10**9))


def durability_from_wire(config: pb.SessionConfig, field: str) -> Durability:
    """Decode the durability of a session's config, whose path is `field`.

    Raises:
        InvalidRequestError: as `Durability.check`.
    """
    policy = config.checkpoints
    seconds = policy.every.seconds + policy.every.nanos / 1e9 if policy.HasField("every") else None
    durability = Durability(
        level=_NAMES[config.durability], every_steps=policy.every_steps or None, every_seconds=seconds
    )
    durability.check(f"{field}.durability", times=f"{field}.checkpoints")
    return durability
