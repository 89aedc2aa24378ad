"""The interface of a formula to the code that runs it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, TypeAlias

from stepwire.optimizers import Hyperparameters

__all__ = ["Decay", "Rule", "Value"]

Value: TypeAlias = Any
"""A float, a NumPy scalar or an array: every function of a formula means the same for each."""


class Decay(enum.Enum):
    """The place of weight decay λ outside the rule. Rules with a place of their own are run with `NONE`.

    NONE: nowhere; a rule of its own, because g + 0·p would turn an infinite parameter into NaN.
    GRADIENT: g ← g + λ·p before the rule (L2).
    BEFORE: p ← p·(1 − lr·λ) before the rule (decoupled; AdamW).
    AFTER: p ← p·(1 − lr·λ) after the rule (bitsandbytes).
    """

    NONE = "none"
    GRADIENT = "gradient"
    BEFORE = "before"
    AFTER = "after"

    def scalar(self, hyper: Hyperparameters) -> float:
        """Return the number that the decay multiplies by."""
        decay = float(hyper.weight_decay or 0.0)
        return decay if self is Decay.GRADIENT else 1.0 - float(hyper.lr) * decay


@dataclasses.dataclass(frozen=True)
class Rule:
    """One optimizer formula, written once.

    Attributes:
        name: unique among the rules.
        update: `(p, g, *slots, *scalars) → (p, *slots)` for one element, in the subset that Numba compiles, NumPy
            evaluates on arrays and the CUDA printer renders. The subset is assignments, + − * /, unary minus, `sqrt`,
            `maximum`, `minimum`, `absolute`, `sign`, and calls of other such functions of this package. Every constant
            is a scalar argument and no literal, because `1.0 * p` is float64 to Numba and float32 to NumPy. Rules may
            have one `update` in common and differ in `scalars`; kernels belong to the `update`.
        slots: the names of the state arrays besides the parameters, in the order of the arguments of `update`.
        scalars: `(hyperparameters, t) → tuple` of the per-step scalars in the order of `update`,
            in float64; t counts this update, the first is 1.
        direction: for layerwise rules, `(p, g, *slots, *scalars) → u` with the scalars of `update` but the last,
            which is the trust ratio; None for the others.
        trust: for layerwise rules, `(hyperparameters, ‖p‖, ‖u‖) → ` the trust ratio of one tensor, whose norms these
            are.
    """

    name: str
    update: Callable[..., tuple[Any, ...]]
    slots: tuple[str, ...]
    scalars: Callable[[Hyperparameters, int], tuple[float, ...]]
    direction: Callable[..., Any] | None = None
    trust: Callable[[Hyperparameters, float, float], float] | None = None
