"""Adam and AMSGrad as torch computes them, and Adam without bias correction.

For parameter p, gradient g, moments m and v (zero before the first step), and t = 1, 2, …:

    g ← −g                            if maximize
    g ← g + λ·p                       if weight decay λ is added to the gradient (L2)
    p ← p·(1 − lr·λ)                  if it is decoupled (AdamW)
    m ← m + (1 − β1)·(g − m)
    v ← β2·v + (1 − β2)·g²
    x ← max(x, v)                     AMSGrad: the running maximum of the raw v stands in for v below
    p ← p − (lr / c1)·m / (√v / √c2 + eps)        c1 = 1 − β1ᵗ, c2 = 1 − β2ᵗ

Without bias correction c1 = c2 = 1, which is the same function with other scalars.

Sources: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2; Reddi, Kale & Kumar 2018,
algorithm 2, all as in `torch.optim.Adam`, `AdamW` of torch 2.13; Devlin et al. 2019 (BERT) for the form
without correction. Optax keeps the maximum of the corrected v and Keras puts eps beside √v before the
correction: other formulas, to be other rules.

Decoupled decay always multiplies, by exactly 1 without decay, so infinite parameters survive. L2 decay is a
function of its own, because 0·∞ would turn them into NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from numpy import maximum, sqrt

from stepwire.optimizers import Adam, Hyperparameters
from stepwire_server.rules.rule import Rule

__all__ = ["ADAM_RULES", "CORRECTS_BIAS", "adam", "adam_l2", "amsgrad", "amsgrad_l2", "rule_for", "slots_for"]

Value: TypeAlias = Any
"""A float, a NumPy scalar or an array: every function here means the same for each."""


def first_moment(m: Value, g: Value, rate1: Value) -> Value:
    """Move the mean gradient towards g; rate1 = 1 − β1."""
    return m + rate1 * (g - m)


def second_moment(v: Value, g: Value, beta2: Value, rate2: Value) -> Value:
    """Move the mean squared gradient towards g²; rate2 = 1 − β2 comes first, so that g² overflows later."""
    return beta2 * v + rate2 * g * g


def descend(p: Value, m: Value, v: Value, step_size: Value, root2: Value, eps: Value) -> Value:
    """Step p against m, scaled by √v; step_size = lr / c1, root2 = √c2."""
    return p - step_size * m / (sqrt(v) / root2 + eps)


def adam(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    sign: Value,
    keep: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    step_size: Value,
    root2: Value,
    eps: Value,
) -> tuple[Value, Value, Value]:
    """Update with decoupled or no decay; sign = −1 to maximize, keep = 1 − lr·λ. See the module."""
    g = sign * g
    m = first_moment(m, g, rate1)
    v = second_moment(v, g, beta2, rate2)
    return descend(keep * p, m, v, step_size, root2, eps), m, v


def adam_l2(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    sign: Value,
    weight_decay: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    step_size: Value,
    root2: Value,
    eps: Value,
) -> tuple[Value, Value, Value]:
    """Update with decay added to the gradient. See the module."""
    g = sign * g + weight_decay * p
    m = first_moment(m, g, rate1)
    v = second_moment(v, g, beta2, rate2)
    return descend(p, m, v, step_size, root2, eps), m, v


def amsgrad(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    x: Value,
    sign: Value,
    keep: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    step_size: Value,
    root2: Value,
    eps: Value,
) -> tuple[Value, Value, Value, Value]:
    """Update by the largest v so far, with decoupled or no decay. See the module."""
    g = sign * g
    m = first_moment(m, g, rate1)
    v = second_moment(v, g, beta2, rate2)
    x = maximum(x, v)
    return descend(keep * p, m, x, step_size, root2, eps), m, v, x


def amsgrad_l2(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    x: Value,
    sign: Value,
    weight_decay: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    step_size: Value,
    root2: Value,
    eps: Value,
) -> tuple[Value, Value, Value, Value]:
    """Update by the largest v so far, with decay added to the gradient. See the module."""
    g = sign * g + weight_decay * p
    m = first_moment(m, g, rate1)
    v = second_moment(v, g, beta2, rate2)
    x = maximum(x, v)
    return descend(p, m, x, step_size, root2, eps), m, v, x


def _scalars(l2: bool, corrected: bool) -> Callable[[Hyperparameters, int], tuple[float, ...]]:
    """Return the function that computes a rule's scalars, in the order of its last eight arguments."""

    def scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
        lr, beta1, beta2 = float(hyper.lr), float(hyper.beta1), float(hyper.beta2)
        decay = float(hyper.weight_decay) if l2 else 1.0 - lr * hyper.weight_decay
        correction1 = 1.0 - beta1**t if corrected else 1.0
        correction2 = 1.0 - beta2**t if corrected else 1.0
        return (
            -1.0 if hyper.maximize else 1.0,
            decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            lr / correction1,
            math.sqrt(correction2),
            float(hyper.eps),
        )

    return scalars


# Formulas of `Adam.formula` that are served, and whether each corrects the bias of the moments.
CORRECTS_BIAS: Final = {"torch": True, "no_bias_correction": False}

_SLOTS: Final = {False: ("exp_avg", "exp_avg_sq"), True: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
_UPDATES: Final[dict[tuple[bool, bool], Callable[..., tuple[Any, ...]]]] = {
    (False, False): adam,
    (False, True): adam_l2,
    (True, False): amsgrad,
    (True, True): amsgrad_l2,
}


def _rule(formula: str, has_maximum: bool, l2: bool) -> Rule:
    update = _UPDATES[has_maximum, l2]
    name = update.__name__ if formula == "torch" else f"{update.__name__}_{formula}"
    return Rule(name, update, _SLOTS[has_maximum], _scalars(l2, CORRECTS_BIAS[formula]))


_RULES: Final = {(formula, *variant): _rule(formula, *variant) for formula in CORRECTS_BIAS for variant in _UPDATES}
ADAM_RULES: Final = tuple(_RULES.values())


def rule_for(optimizer: Adam, hyper: Hyperparameters) -> Rule:
    """Return the rule of one parameter group in one step; `hyper` is what that step uses."""
    l2 = hyper.weight_decay != 0.0 and not optimizer.decoupled_weight_decay
    return _RULES[optimizer.formula, optimizer.amsgrad, l2]


def slots_for(optimizer: Adam) -> tuple[str, ...]:
    """Return the state arrays that the optimizer keeps besides the parameters."""
    return _SLOTS[optimizer.amsgrad]
