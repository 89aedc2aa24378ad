"""Dynamic loss scaling: `torch.amp.GradScaler`'s rule.

s ← s·backoff      after a step with NaN or Inf, and the count of clean steps starts again
s ← s·growth       after `growth_interval` clean steps, likewise, unless that is beyond its bounds

A step is one that updates, or is skipped: of those that are accumulated, all together are one. So all gradients of a
sum have one scale, as GradScaler's users have it, who call `update` once an update.
"""

from __future__ import annotations

from typing import NamedTuple

from stepwire.optimizers.gradient_treatment import LARGEST_SCALE, SMALLEST_SCALE, LossScaling

__all__ = ["LossScale", "after_step"]


class LossScale(NamedTuple):
    """The state of loss scaling.

    Attributes:
        scale: the factor by which the next gradient must have been multiplied.
        clean_steps: the number of updates since the scale changed last.
    """

    scale: float
    clean_steps: int = 0


def after_step(now: LossScale, scaling: LossScaling, *, finite: bool) -> LossScale:
    """Return the state of loss scaling after an update, or a skipped one; the scale stays within its bounds."""
    if not finite:
        return LossScale(max(now.scale * scaling.backoff_factor, SMALLEST_SCALE))
    if now.clean_steps + 1 < scaling.growth_interval:
        return LossScale(now.scale, now.clean_steps + 1)
    grown = now.scale * scaling.growth_factor
    return LossScale(grown if grown <= LARGEST_SCALE else now.scale)
