"""Adam and its AMSGrads, in the form of each framework.

For parameter p, gradient g, moments m and v (zero before the first step), c1 = 1 − β1ᵗ, c2 = 1 − β2ᵗ and t = 1, 2, …:

    m ← m + (1 − β1)·(g − m)
    v ← β2·v + (1 − β2)·g²

    torch                 p ← p − (lr / c1)·m / (√v / √c2 + eps)
      AMSGrad, raw        x ← max(x, v) stands in for v
    keras                 p ← p − (lr·√c2 / c1)·m / (√v + eps)                  also TensorFlow, MXNet
      AMSGrad, raw        x ← max(x, v) stands in for v
    no_bias_correction    p ← p − lr·m / (√v + eps)                             Keras's with c1 = c2 = 1; BERT
      AMSGrad, raw        x ← max(x, v) stands in for v
    optax                 p ← p − (lr / c1)·m / (√(v / c2 + eps_root) + eps)
      AMSGrad, corrected  x ← max(x, v / c2) stands in for v / c2
      Nesterov            β1·m / (1 − β1ᵗ⁺¹) + (1 − β1)·g / c1 stands in for m / c1
    decay_after           torch's, with decoupled decay after the update        bitsandbytes

Formula optax has β1·m + (1 − β1)·g for the new m, the same but for rounding. Weight decay is outside these functions:
`Decay` names its place and form. Decoupled decay is that of the framework: BEFORE in torch, APART in Keras, WITHIN in
optax and BERT, AFTER in bitsandbytes.

torch's form is computed as Keras's with eps·√c2 for eps: the same number by one division and one rounded scalar less.
In float32 the first updates are within 4.8 ulps of the formula then; dividing √v by √c2 would leave them within 5.5.
m is divided first, and multiplied by the step's size then, as in the frameworks: the product of a gradient of 1e-38
and a learning rate would lose its digits.

Sources: Kingma & Ba 2015, algorithm 1, and the remark on ε̂ in its section 2 (Keras's form); Loshchilov & Hutter 2019,
algorithm 2; Reddi, Kale & Kumar 2018, algorithm 2; Dozat 2016; Devlin et al. 2019 for the form without correction; the
code of torch 2.13, Keras 3.15, optax 0.2.8 and bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from numpy import maximum, sqrt

from stepwire.optimizers import Hyperparameters, Optimizer
from stepwire_server.rules.moments import first_moment, second_moment, weighted_mean
from stepwire_server.rules.rule import Decay, Rule, Value

__all__ = [
    "ADAM_RULES",
    "adam",
    "adam_nesterov",
    "adam_optax",
    "adam_rule_for",
    "amsgrad",
    "amsgrad_optax",
    "sparse_scalars",
]


def adam(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    step_size: Value,
    eps: Value,
) -> tuple[Value, Value, Value]:
    """Update with eps beside √v, as Keras does, and as torch does for other numbers. See the module."""
    m = first_moment(m, g, rate1)
    v = second_moment(v, g, beta2, rate2)
    return p - step_size * (m / (sqrt(v) + eps)), m, v


def amsgrad(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    x: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    step_size: Value,
    eps: Value,
) -> tuple[Value, Value, Value, Value]:
    """Update by the largest v so far, with eps beside its root. See the module."""
    m = first_moment(m, g, rate1)
    v = second_moment(v, g, beta2, rate2)
    x = maximum(x, v)
    return p - step_size * (m / (sqrt(x) + eps)), m, v, x


def adam_optax(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    beta1: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    step_size: Value,
    correction2: Value,
    eps_root: Value,
    eps: Value,
) -> tuple[Value, Value, Value]:
    """Update as optax does; step_size = lr / c1, correction2 = c2. See the module."""
    m = weighted_mean(m, g, beta1, rate1)
    v = second_moment(v, g, beta2, rate2)
    return p - step_size * (m / (sqrt(v / correction2 + eps_root) + eps)), m, v


def amsgrad_optax(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    x: Value,
    beta1: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    step_size: Value,
    correction2: Value,
    eps_root: Value,
    eps: Value,
) -> tuple[Value, Value, Value, Value]:
    """Update by the largest corrected v so far, as optax does. See the module."""
    m = weighted_mean(m, g, beta1, rate1)
    v = second_moment(v, g, beta2, rate2)
    x = maximum(x, v / correction2)
    return p - step_size * (m / (sqrt(x + eps_root) + eps)), m, v, x


def adam_nesterov(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    beta1: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    next_size: Value,
    gradient_size: Value,
    correction2: Value,
    eps_root: Value,
    eps: Value,
) -> tuple[Value, Value, Value]:
    """Update as optax's nadam; next_size = lr·β1 / (1 − β1ᵗ⁺¹), gradient_size = lr·(1 − β1) / c1. See the module."""
    m = weighted_mean(m, g, beta1, rate1)
    v = second_moment(v, g, beta2, rate2)
    return p - (next_size * m + gradient_size * g) / (sqrt(v / correction2 + eps_root) + eps), m, v


# The smallest float32 above 0, which an eps > 0 must not fall below: without any, 0 / 0 would be NaN.
_SMALLEST: Final = 2.0**-149


class _Numbers(NamedTuple):
    """An update's numbers as float64: corrections c1, c2 are 1 at β = 0."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    eps_root: float
    c1: float
    c2: float

    def rates(self) -> tuple[float, float, float]:
        return 1.0 - self.beta1, self.beta2, 1.0 - self.beta2


def _numbers(hyper: Hyperparameters, t: int) -> _Numbers:
    assert hyper.beta1 is not None and hyper.beta2 is not None  # as every form of Adam has them
    beta1, beta2 = float(hyper.beta1), float(hyper.beta2)
    eps, eps_root = float(hyper.eps or 0.0), float(hyper.eps_root or 0.0)
    return _Numbers(float(hyper.lr), beta1, beta2, eps, eps_root, 1.0 - beta1**t, 1.0 - beta2**t)


def _torch_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    n = _numbers(hyper, t)
    root = math.sqrt(n.c2)
    return (*n.rates(), n.lr * root / n.c1, max(n.eps * root, min(n.eps, _SMALLEST)))


def _keras_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    n = _numbers(hyper, t)
    return (*n.rates(), n.lr * math.sqrt(n.c2) / n.c1, n.eps)


def sparse_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    """Return the scalars of `rows.adam_sparse`."""
    rate1, _, rate2, step_size, eps = _keras_scalars(hyper, t)
    return rate1, rate2, step_size, eps


def _uncorrected_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    n = _numbers(hyper, t)
    return (*n.rates(), n.lr, n.eps)


def _optax_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    n = _numbers(hyper, t)
    return (n.beta1, *n.rates(), n.lr / n.c1, n.c2, n.eps_root, n.eps)


def _nesterov_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    n = _numbers(hyper, t)
    following = n.lr * n.beta1 / (1.0 - n.beta1 ** (t + 1))
    return (n.beta1, *n.rates(), following, n.lr * (1.0 - n.beta1) / n.c1, n.c2, n.eps_root, n.eps)


_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_MAXIMUM: Final = (*_MOMENTS, "max_exp_avg_sq")

_Scalars = Callable[[Hyperparameters, int], tuple[float, ...]]
_FORMS: Final[dict[tuple[str, str], tuple[Callable[..., tuple[Any, ...]], _Scalars]]] = {
    ("torch", "none"): (adam, _torch_scalars),
    ("torch", "raw"): (amsgrad, _torch_scalars),
    ("keras", "none"): (adam, _keras_scalars),
    ("keras", "raw"): (amsgrad, _keras_scalars),
    ("no_bias_correction", "none"): (adam, _uncorrected_scalars),
    ("no_bias_correction", "raw"): (amsgrad, _uncorrected_scalars),
    ("optax", "none"): (adam_optax, _optax_scalars),
    ("optax", "corrected"): (amsgrad_optax, _optax_scalars),
    ("optax", "nesterov"): (adam_nesterov, _nesterov_scalars),
    ("decay_after", "none"): (adam, _torch_scalars),
}
_RULES: Final = {
    (formula, kind): Rule(
        "_".join(["adam", formula, *([] if kind == "none" else [kind])]),
        update,
        _MAXIMUM if kind in ("raw", "corrected") else _MOMENTS,
        scalars,
        means=() if formula == "optax" else (("exp_avg", "beta1"), ("exp_avg_sq", "beta2")),
    )
    for (formula, kind), (update, scalars) in _FORMS.items()
}
ADAM_RULES: Final = tuple(_RULES.values())

_DECOUPLED: Final = {
    "torch": Decay.BEFORE,
    "keras": Decay.APART,
    "optax": Decay.WITHIN,
    "no_bias_correction": Decay.WITHIN,
    "decay_after": Decay.AFTER,
}


def adam_rule_for(optimizer: Optimizer) -> tuple[Rule, Decay]:
    """Return the rule of an `Adam` and the place of its weight decay."""
    structure = optimizer.structure()
    rule = _RULES[structure.formula, "nesterov" if structure.nesterov else structure.amsgrad]
    decoupled = structure.decoupled_weight_decay or structure.formula == "decay_after"
    return rule, _DECOUPLED[structure.formula] if decoupled else Decay.GRADIENT
