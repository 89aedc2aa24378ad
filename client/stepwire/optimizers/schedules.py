"""Learning-rate schedules: the records of schedules, and the ranges of their numbers.

The equations are in the server's `schedules`. Client and server check the ranges in this module alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final, Literal, get_args

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.hyperparameters import number, whole_number
from stepwire.v1 import optimizer_pb2

__all__ = ["SCHEDULE_KINDS", "Schedule", "ScheduleKind", "schedule_from_wire", "schedule_to_wire"]

ScheduleKind = Literal["constant", "linear", "cosine", "step", "exponential", "polynomial", "one_cycle"]

SCHEDULE_KINDS: Final[dict[ScheduleKind, optimizer_pb2.ScheduleKind]] = {
    "constant": optimizer_pb2.SCHEDULE_KIND_CONSTANT,
    "linear": optimizer_pb2.SCHEDULE_KIND_LINEAR,
    "cosine": optimizer_pb2.SCHEDULE_KIND_COSINE,
    "step": optimizer_pb2.SCHEDULE_KIND_STEP,
    "exponential": optimizer_pb2.SCHEDULE_KIND_EXPONENTIAL,
    "polynomial": optimizer_pb2.SCHEDULE_KIND_POLYNOMIAL,
    "one_cycle": optimizer_pb2.SCHEDULE_KIND_ONE_CYCLE,
}
_KIND_NAMES: Final[dict[int, ScheduleKind]] = {value: name for name, value in SCHEDULE_KINDS.items()}

# Every count of updates below this limit is a float64 exactly, so that a schedule's fractions are correctly rounded.
_LIMIT: Final = 2**53

# The allowed values of a field, in the words of an error.
_RANGES: Final = {
    "warmup_steps": "a whole number in [0, 2^53), >= 1 for one_cycle",
    "total_steps": "a whole number, > warmup_steps and < 2^53",
    "final_factor": "finite and >= 0",
    "gamma": "finite and > 0",
    "interval_steps": "a whole number in [1, 2^53)",
    "warmup_start_factor": "finite and >= 0",
}

# The kinds that use a field, for fields that not all kinds use; and the kinds that require a field.
_USERS: Final[dict[str, tuple[ScheduleKind, ...]]] = {
    "total_steps": ("linear", "cosine", "polynomial", "one_cycle"),
    "final_factor": ("linear", "cosine", "polynomial", "one_cycle"),
    "gamma": ("step", "exponential", "polynomial"),
    "interval_steps": ("step",),
}
_REQUIRED: Final[dict[str, tuple[ScheduleKind, ...]]] = {
    "warmup_steps": ("one_cycle",),
    "total_steps": _USERS["total_steps"],
    "gamma": _USERS["gamma"],
    "interval_steps": _USERS["interval_steps"],
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A factor of a group's `lr`, which the server evaluates in float64 at every update without an `lr` of its own.

    A schedule counts updates: the group's first is at s = 0. Warm-up comes first. The kind's own shape begins at
    s = `warmup_steps`, and past its end a schedule keeps its last value. 0 means "not set", as in the contract.

    The constructors, such as `Schedule.cosine(10_000, warmup_steps=500)`, check their arguments. `check` checks a
    record made directly, under the path of its group.

    Attributes:
        kind: the shape.
        warmup_steps: the number of updates from `warmup_start_factor` to 1, below 2^53. A line; half a cosine for
            `"one_cycle"`, which requires a warm-up.
        total_steps: the update at which `final_factor` is reached, warm-up included: > `warmup_steps`, below 2^53.
            Required by linear, cosine, polynomial and one-cycle, refused by other kinds.
        final_factor: the last factor, finite, ≥ 0. Used by the same four kinds.
        gamma: the factor of each drop (step, exponential) or the power (polynomial), finite, > 0. Required by them.
        interval_steps: the number of updates between drops, ≥ 1, below 2^53. Required by step, refused by other kinds.
        warmup_start_factor: the factor at s = 0 of a warm-up, finite, ≥ 0; refused without a warm-up.
    """

    kind: ScheduleKind
    warmup_steps: int = 0
    total_steps: int = 0
    final_factor: float = 0.0
    gamma: float = 0.0
    interval_steps: int = 0
    warmup_start_factor: float = 0.0

    @classmethod
    def constant(cls, warmup_steps: int = 0, *, warmup_start_factor: float = 0.0) -> Schedule:
        """Return a warm-up alone: the factor stays 1 after it.

        Raises:
            InvalidRequestError: a value out of range.
        """
        return cls(kind="constant", warmup_steps=warmup_steps, warmup_start_factor=warmup_start_factor)._checked()

    @classmethod
    def linear(
        cls, total_steps: int, *, final_factor: float = 0.0, warmup_steps: int = 0, warmup_start_factor: float = 0.0
    ) -> Schedule:
        """Return a straight line from 1 to `final_factor` at update `total_steps`.

        Raises:
            InvalidRequestError: a value out of range.
        """
        return cls(
            kind="linear",
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            final_factor=final_factor,
            warmup_start_factor=warmup_start_factor,
        )._checked()

    @classmethod
    def cosine(
        cls, total_steps: int, *, final_factor: float = 0.0, warmup_steps: int = 0, warmup_start_factor: float = 0.0
    ) -> Schedule:
        """Return half a cosine from 1 to `final_factor` at update `total_steps`.

        Raises:
            InvalidRequestError: a value out of range.
        """
        return cls(
            kind="cosine",
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            final_factor=final_factor,
            warmup_start_factor=warmup_start_factor,
        )._checked()

    @classmethod
    def step(
        cls, interval_steps: int, gamma: float, *, warmup_steps: int = 0, warmup_start_factor: float = 0.0
    ) -> Schedule:
        """Return stairs: a factor `gamma` more every `interval_steps` updates.

        Raises:
            InvalidRequestError: a value out of range.
        """
        return cls(
            kind="step",
            warmup_steps=warmup_steps,
            gamma=gamma,
            interval_steps=interval_steps,
            warmup_start_factor=warmup_start_factor,
        )._checked()

    @classmethod
    def exponential(cls, gamma: float, *, warmup_steps: int = 0, warmup_start_factor: float = 0.0) -> Schedule:
        """Return a factor `gamma` more every update.

        Raises:
            InvalidRequestError: a value out of range.
        """
        return cls(
            kind="exponential", warmup_steps=warmup_steps, gamma=gamma, warmup_start_factor=warmup_start_factor
        )._checked()

    @classmethod
    def polynomial(
        cls,
        total_steps: int,
        power: float,
        *,
        final_factor: float = 0.0,
        warmup_steps: int = 0,
        warmup_start_factor: float = 0.0,
    ) -> Schedule:
        """Return (1 − x)^`power` from 1 to `final_factor` at update `total_steps`; the power travels as `gamma`.

        Raises:
            InvalidRequestError: a value out of range.
        """
        return cls(
            kind="polynomial",
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            final_factor=final_factor,
            gamma=power,
            warmup_start_factor=warmup_start_factor,
        )._checked()

    @classmethod
    def one_cycle(
        cls,
        total_steps: int,
        *,
        rise_fraction: float = 0.3,
        initial_factor: float = 1 / 25,
        final_factor: float = 1 / (25 * 10_000),
    ) -> Schedule:
        """Return half a cosine up to 1 and half a cosine down; the group's `lr` is the peak.

        The defaults are those of `torch.optim.lr_scheduler.OneCycleLR` and optax's `cosine_onecycle_schedule`. The
        end is at update `total_steps`, and the peak at update `rise_fraction · total_steps`, rounded and at least 1.

        Torch's phases end one update earlier, at `pct_start · T − 1` and `T − 1` for its `total_steps` T. The same
        numbers are `Schedule(kind="one_cycle", warmup_steps=pct_start * T - 1, total_steps=T - 1, …)`. Torch also
        cycles the momentum by default; this schedule does not. Optax rounds the peak down.

        Args:
            total_steps: the update at which `final_factor` is reached, ≥ 2.
            rise_fraction: the fraction of `total_steps` before the peak, in (0, 1).
            initial_factor: the factor of the first update, 1 / `div_factor` of torch and optax.
            final_factor: the last factor, 1 / (`div_factor` · `final_div_factor`).

        Returns:
            The schedule.

        Raises:
            InvalidRequestError: a value out of range.
        """
        fraction = number(rise_fraction, "schedule.rise_fraction")
        if not 0.0 < fraction < 1.0:
            raise InvalidRequestError.of(
                "schedule.rise_fraction", f"rise_fraction is {rise_fraction!r}; it must be in (0, 1)"
            )
        total = whole_number(total_steps, "schedule.total_steps")
        return cls(
            kind="one_cycle",
            warmup_steps=max(1, min(total - 1, round(fraction * min(total, _LIMIT)))),
            total_steps=total,
            final_factor=final_factor,
            warmup_start_factor=initial_factor,
        )._checked()

    def check(self, field: str = "schedule") -> None:
        """Refuse an unknown kind, and values that are out of range, missing, unused or contradictory.

        Raises:
            InvalidRequestError: the message names the field, the value and the allowed range.
        """
        if self.kind not in get_args(ScheduleKind):
            raise InvalidRequestError.of(f"{field}.kind", f"kind is {self.kind!r:.80}; {_use_one_of_the_kinds()}")
        for name in _RANGES:
            self._check_range(name, f"{field}.{name}")
            self._check_use(name, f"{field}.{name}")
        if self.warmup_start_factor and not self.warmup_steps:
            problem = f"warmup_start_factor is {self.warmup_start_factor!r}, but warmup_steps is 0"
            raise InvalidRequestError.of(
                f"{field}.warmup_start_factor", f"{problem}; set warmup_steps, or leave warmup_start_factor out"
            )
        if self.total_steps and self.total_steps <= self.warmup_steps:
            problem = f"total_steps is {self.total_steps}; it must be > warmup_steps, which is {self.warmup_steps}"
            raise InvalidRequestError.of(f"{field}.total_steps", problem)

    def _check_range(self, name: str, field: str) -> None:
        value = getattr(self, name)
        if name.endswith("_steps"):
            good = 0 <= whole_number(value, field) < _LIMIT
        else:
            good = 0.0 <= number(value, field) < math.inf
        if not good:
            raise InvalidRequestError.of(field, f"{name} is {value!r:.80}; it must be {_RANGES[name]}")

    def _check_use(self, name: str, field: str) -> None:
        value = getattr(self, name)
        if value and self.kind not in _USERS.get(name, (self.kind,)):
            users = ", ".join(_USERS[name])
            problem = f"{name} is {value!r}; kind {self.kind!r} does not use it: leave it out (used by: {users})"
            raise InvalidRequestError.of(field, problem)
        if not value and self.kind in _REQUIRED.get(name, ()):
            raise InvalidRequestError.of(
                field, f"{name} is {value!r}, or not set; kind {self.kind!r} needs {_RANGES[name]}"
            )

    def _checked(self) -> Schedule:
        self.check()
        return self


def schedule_to_wire(schedule: Schedule) -> optimizer_pb2.Schedule:
    """Encode a checked schedule."""
    return optimizer_pb2.Schedule(
        kind=SCHEDULE_KINDS[schedule.kind],
        warmup_steps=int(schedule.warmup_steps),
        total_steps=int(schedule.total_steps),
        final_factor=float(schedule.final_factor),
        gamma=float(schedule.gamma),
        interval_steps=int(schedule.interval_steps),
        warmup_start_factor=float(schedule.warmup_start_factor),
    )


def schedule_from_wire(message: optimizer_pb2.Schedule, field: str) -> Schedule:
    """Decode and check a schedule; `field` is the path that an error names.

    Raises:
        InvalidRequestError: the kind is unspecified or unknown, or a value is refused as in `Schedule.check`.
    """
    if message.kind not in _KIND_NAMES:
        problem = f"{message.kind} is unknown" if message.kind else "kind is missing"
        raise InvalidRequestError.of(f"{field}.kind", f"{problem}; {_use_one_of_the_kinds()}")
    schedule = Schedule(
        kind=_KIND_NAMES[message.kind],
        warmup_steps=message.warmup_steps,
        total_steps=message.total_steps,
        final_factor=message.final_factor,
        gamma=message.gamma,
        interval_steps=message.interval_steps,
        warmup_start_factor=message.warmup_start_factor,
    )
    schedule.check(field)
    return schedule


def _use_one_of_the_kinds() -> str:
    return f"use one of: {', '.join(get_args(ScheduleKind))}"
