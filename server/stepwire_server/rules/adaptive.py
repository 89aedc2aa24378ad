"""RMSprop, Adagrad and Adadelta as torch computes them.

With mean square v, mean a, momentum buffer b, sum s, mean squared update d, all zero before the first step:

    RMSprop    v ← α·v + (1 − α)·g²
               p ← p − lr·g / (√v + eps)
      centered a ← a + (1 − α)·(g − a),  √(v − a²) stands in for √v
      momentum b ← μ·b + g / (√v + eps),  p ← p − lr·b
    Adagrad    s ← s + g²                                                 s starts as the initial accumulator value
               p ← p − lr / (1 + (t − 1)·η)·g / (√s + eps)
    Adadelta   v ← ρ·v + (1 − ρ)·g²
               u ← √(d + eps) / √(v + eps)·g
               d ← ρ·d + (1 − ρ)·u²
               p ← p − lr·u

Rounding can leave v − a² just below zero, whose root is NaN in torch; here it counts as zero.

Sources: Hinton 2012, lecture 6e; Graves 2013, equation 40 (whose eps is inside the root; torch's is outside); Duchi,
Hazan & Singer 2011; Zeiler 2012; the code of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

from numpy import maximum, minimum, sqrt

from stepwire.optimizers import LARGEST_NUMBER, Hyperparameters
from stepwire_server.rules.moments import first_moment, second_moment
from stepwire_server.rules.rule import Rule, Value

__all__ = [
    "ADADELTA",
    "ADAGRAD",
    "RMSPROP_RULES",
    "adadelta",
    "adagrad",
    "rmsprop",
    "rmsprop_centered",
    "rmsprop_centered_momentum",
    "rmsprop_momentum",
]


def deviation(v: Value, a: Value, zero: Value, largest: Value) -> Value:
    """Return the root of the variance v − a², at least zero; infinite where v is, because a² stays finite."""
    return sqrt(maximum(v - minimum(a * a, largest), zero))


def rmsprop(p: Value, g: Value, v: Value, alpha: Value, rate: Value, lr: Value, eps: Value) -> tuple[Value, Value]:
    """Divide by the root mean square; rate = 1 − α. See the module."""
    v = second_moment(v, g, alpha, rate)
    return p - lr * (g / (sqrt(v) + eps)), v


def rmsprop_momentum(
    p: Value, g: Value, v: Value, b: Value, alpha: Value, rate: Value, lr: Value, eps: Value, momentum: Value
) -> tuple[Value, Value, Value]:
    """Divide by the root mean square and follow the momentum of that. See the module."""
    v = second_moment(v, g, alpha, rate)
    b = momentum * b + g / (sqrt(v) + eps)
    return p - lr * b, v, b


def rmsprop_centered(
    p: Value,
    g: Value,
    v: Value,
    a: Value,
    alpha: Value,
    rate: Value,
    lr: Value,
    eps: Value,
    zero: Value,
    largest: Value,
) -> tuple[Value, Value, Value]:
    """Divide by the standard deviation. See the module."""
    v = second_moment(v, g, alpha, rate)
    a = first_moment(a, g, rate)
    return p - lr * (g / (deviation(v, a, zero, largest) + eps)), v, a


def rmsprop_centered_momentum(
    p: Value,
    g: Value,
    v: Value,
    b: Value,
    a: Value,
    alpha: Value,
    rate: Value,
    lr: Value,
    eps: Value,
    zero: Value,
    largest: Value,
    momentum: Value,
) -> tuple[Value, Value, Value, Value]:
    """Divide by the standard deviation and follow the momentum of that. See the module."""
    v = second_moment(v, g, alpha, rate)
    a = first_moment(a, g, rate)
    b = momentum * b + g / (deviation(v, a, zero, largest) + eps)
    return p - lr * b, v, b, a


def adagrad(p: Value, g: Value, s: Value, lr: Value, eps: Value) -> tuple[Value, Value]:
    """Divide by the root of the sum of squares; lr is the decayed one. See the module."""
    s = s + g * g
    return p - lr * (g / (sqrt(s) + eps)), s


def adadelta(
    p: Value, g: Value, v: Value, d: Value, rho: Value, rate: Value, lr: Value, eps: Value
) -> tuple[Value, Value, Value]:
    """Scale by the root mean squared update over that of the gradient; rate = 1 − ρ. See the module."""
    v = second_moment(v, g, rho, rate)
    u = sqrt(d + eps) / sqrt(v + eps) * g
    return p - lr * u, v, second_moment(d, u, rho, rate)


def _rmsprop_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    alpha = float(cast(float, hyper.alpha))
    return (alpha, 1.0 - alpha, float(hyper.lr), float(cast(float, hyper.eps)))


def _rmsprop_momentum_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    return (*_rmsprop_scalars(hyper, t), float(cast(float, hyper.momentum)))


def _centered_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    return (*_rmsprop_scalars(hyper, t), 0.0, LARGEST_NUMBER)


def _centered_momentum_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    return (*_centered_scalars(hyper, t), float(cast(float, hyper.momentum)))


def _adagrad_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    return (float(hyper.lr) / (1.0 + (t - 1) * float(cast(float, hyper.decay))), float(cast(float, hyper.eps)))


_Scalars = Callable[[Hyperparameters, int], tuple[float, ...]]
_RMSPROP: Final[dict[tuple[bool, bool], tuple[Callable[..., tuple[Any, ...]], tuple[str, ...], _Scalars]]] = {
    (False, False): (rmsprop, ("square_avg",), _rmsprop_scalars),
    (False, True): (rmsprop_momentum, ("square_avg", "momentum_buffer"), _rmsprop_momentum_scalars),
    (True, False): (rmsprop_centered, ("square_avg", "grad_avg"), _centered_scalars),
    (True, True): (
        rmsprop_centered_momentum,
        ("square_avg", "momentum_buffer", "grad_avg"),
        _centered_momentum_scalars,
    ),
}
_MEANS: Final = (("square_avg", "alpha"), ("grad_avg", "alpha"))
RMSPROP_RULES: Final = {
    (centered, momentum): Rule(update.__name__, update, slots, scalars, _MEANS if centered else _MEANS[:1])
    for (centered, momentum), (update, slots, scalars) in _RMSPROP.items()
}
"""By whether it is centered and whether it has momentum."""

ADAGRAD: Final = Rule("adagrad", adagrad, ("sum",), _adagrad_scalars)
ADADELTA: Final = Rule("adadelta", adadelta, ("square_avg", "acc_delta"), _rmsprop_scalars, _MEANS[:1])
