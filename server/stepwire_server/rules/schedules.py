"""The factor of a group's learning rate at each of its updates, in float64 on the host.

With s the updates before this one, w = `warmup_steps`, b = `warmup_start_factor`, T = `total_steps`,
f = `final_factor`, γ = `gamma`, and x = (s − w) / (T − w), which stays 1 from s = T on:

| kind | before w | from w on | torch.optim.lr_scheduler | optax |
| --- | --- | --- | --- | --- |
| constant | line | 1 | LinearLR (the warm-up) | linear_schedule |
| linear | line | 1 + (f − 1)·x | LinearLR | linear_schedule |
| cosine | line | f + (1 − f)·(1 + cos πx) / 2 | CosineAnnealingLR | cosine_decay_schedule |
| step | line | γ^⌊(s − w) / interval⌋ | StepLR | exponential_decay, staircase |
| exponential | line | γ^(s − w) | ExponentialLR | exponential_decay |
| polynomial | line | f + (1 − f)·(1 − x)^γ | PolynomialLR (f = 0) | polynomial_schedule |
| one_cycle | half cosine | f + (1 − f)·(1 + cos πx) / 2 | OneCycleLR | cosine_onecycle_schedule |

    line          b + (1 − b)·s / w
    half cosine   b + (1 − b)·(1 − cos(πs / w)) / 2

A warm-up before a kind is torch's SequentialLR with LinearLR first and the milestone w, or optax's
`join_schedules`. Torch's CosineAnnealingLR swings back up past its end; here, as in optax, the last value stays.
OneCycleLR's phases end at `pct_start · total_steps − 1` and `total_steps − 1`: these are w and T. Optax's end at
`pct_start · transition_steps`, rounded down, and `transition_steps`.

All but the powers are a mean of 1 and an end value, and are computed as such (`mix`). So 1 and the end are hit exactly,
and no finite f overflows. Powers of γ > 1 stop at the largest float64, because lr = 0 times infinity would be NaN.
"""

from __future__ import annotations

import math
import sys

from stepwire.optimizers.schedules import Schedule

__all__ = ["factor"]


def factor(schedule: Schedule, updates_before: int) -> float:
    """Return the factor of `lr` at the update after `updates_before` others; see the module's table.

    Args:
        schedule: a checked record.
        updates_before: s, the number of the group's updates so far, ≥ 0.

    Returns:
        A finite number ≥ 0.
    """
    if updates_before < schedule.warmup_steps:
        done = updates_before / schedule.warmup_steps
        return rise(done, schedule.warmup_start_factor, smooth=schedule.kind == "one_cycle")
    since = updates_before - schedule.warmup_steps
    match schedule.kind:
        case "constant":
            return 1.0
        case "linear":
            return linear(_progress(schedule, since), schedule.final_factor)
        case "cosine" | "one_cycle":
            return cosine(_progress(schedule, since), schedule.final_factor)
        case "polynomial":
            return polynomial(_progress(schedule, since), schedule.final_factor, schedule.gamma)
        case "step":
            return exponential(since // schedule.interval_steps, schedule.gamma)
        case "exponential":
            return exponential(since, schedule.gamma)


def mix(weight: float, end: float) -> float:
    """Return weight·1 + (1 − weight)·end."""
    return weight + (1.0 - weight) * end


def rise(done: float, start: float, *, smooth: bool) -> float:
    """Go from `start` at 0 done towards 1: on a line, or on half a cosine."""
    return mix((1.0 - math.cos(math.pi * done)) / 2.0 if smooth else done, start)


def linear(x: float, final: float) -> float:
    """Go from 1 to `final` on a line."""
    return mix(1.0 - x, final)


def cosine(x: float, final: float) -> float:
    """Go from 1 to `final` on half a cosine."""
    return mix((1.0 + math.cos(math.pi * x)) / 2.0, final)


def polynomial(x: float, final: float, power: float) -> float:
    """Go from 1 to `final` as a power of the rest."""
    return mix(math.pow(1.0 - x, power), final)


def exponential(drops: int, gamma: float) -> float:
    """Return gamma^drops, or the largest float64 where that is beyond it."""
    try:
        return math.pow(gamma, drops)
    except OverflowError:
        return sys.float_info.max


def _progress(schedule: Schedule, since: int) -> float:
    whole = schedule.total_steps - schedule.warmup_steps
    return min(since, whole) / whole
