"""The interface of a formula to the code that runs it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from stepwire.optimizers import Hyperparameters

__all__ = ["Decay", "Rule", "TensorScalar", "Value"]

Value: TypeAlias = Any
"""A float, a NumPy scalar or an array: every function of a formula means the same for each."""


class Decay(enum.Enum):
    """The place and form of weight decay λ outside the rule. Rules with a place of their own are run with `NONE`.

    Four forms are decoupled. In exact arithmetic all but AFTER are the same, and in float32 they are not: see
    `treatment`.

    NONE: nowhere; a rule of its own, because g + 0·p would turn an infinite parameter into NaN.
    GRADIENT: g ← g + λ·p before the rule (L2).
    BEFORE: p ← p·(1 − lr·λ) before the rule (torch).
    APART: p ← p − lr·λ·p before the rule (Keras).
    WITHIN: p ← p − (d + lr·λ·p) where the rule moves p by −d (optax, BERT, Lion).
    AFTER: p ← p·(1 − lr·λ) after the rule (bitsandbytes).
    """

    NONE = "none"
    GRADIENT = "gradient"
    BEFORE = "before"
    APART = "apart"
    WITHIN = "within"
    AFTER = "after"

    def scalar(self, hyper: Hyperparameters) -> float:
        """Return the number that the decay multiplies by."""
        decay = float(hyper.weight_decay or 0.0)
        if self is Decay.GRADIENT:
            return decay
        lost = float(hyper.lr) * decay
        return lost if self in (Decay.APART, Decay.WITHIN) else 1.0 - lost


class TensorScalar(NamedTuple):
    """A number that a rule keeps for each tensor, because it cannot be told from t and the present numbers.

    Attributes:
        following: `(hyperparameters, t, scalar) → ` the scalar after update t; the argument is that before it.
        derived: `(hyperparameters, t) → ` the scalar after t updates with the same numbers all along.
    """

    following: Callable[[Hyperparameters, int, float], float]
    derived: Callable[[Hyperparameters, int], float]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One optimizer formula, written once.

    Attributes:
        name: unique among the rules.
        update: `(p, g, *slots, *scalars) → (p, *slots)` for one element, in the subset that Numba compiles, NumPy
            evaluates on arrays and the CUDA printer renders. The subset is assignments, + − * /, unary minus, `sqrt`,
            `maximum`, `minimum`, `absolute`, `sign`, and calls of other such functions of this package. Every constant
            is a scalar argument and no literal, because `1.0 * p` is float64 to Numba and float32 to NumPy. p occurs
            once, as `p − …`, but in layerwise rules: see `Recipe.stages`. Rules may have one `update` in common and
            differ in `scalars`; kernels belong to the `update`.
        slots: the names of the state arrays besides the parameters, in the order of the arguments of `update`.
        scalars: `(hyperparameters, t) → tuple` of the per-step scalars in the order of `update`,
            in float64; t counts this update, the first is 1. A rule with a `tensor_scalar` has it before this update as
            a third argument; without the argument, it is the derived one.
        means: the slots that the rule moves towards the gradient or its square and reads for nothing else, each with
            the name of the number that weighs the past. At a weight of 0 nothing of the past may be left, and the form
            of the recurrence alone does not see to it. Of no layerwise rule.
        tensor_scalar: the number that the rule keeps for each tensor; None for none.
        direction: for layerwise rules, `(p, g, *slots, *scalars) → u` with the scalars of `update` but the last,
            which is the trust ratio; None for the others.
        trust: for layerwise rules, `(hyperparameters, ‖p‖, ‖u‖) → (lr, ratio)`, the last two scalars of `update` for
            the tensor whose norms these are.
    """

    name: str
    update: Callable[..., tuple[Any, ...]]
    slots: tuple[str, ...]
    scalars: Callable[..., tuple[float, ...]]
    means: tuple[tuple[str, str], ...] = ()
    tensor_scalar: TensorScalar | None = None
    direction: Callable[..., Any] | None = None
    trust: Callable[[Hyperparameters, float, float], tuple[float, float]] | None = None

    def forgotten(self, hyper: Hyperparameters) -> tuple[str, ...]:
        """Name the slots of `means` that keep nothing of the past."""
        return tuple(slot for slot, weight in self.means if not getattr(hyper, weight))
