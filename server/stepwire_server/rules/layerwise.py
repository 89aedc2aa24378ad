"""LAMB and LARS as optax computes them: the step is scaled tensor by tensor.

With m, v, c1, c2 as Adam's, momentum buffer b, decay λ, trust coefficient η, and the norms of a whole tensor:

    LAMB     u ← (m / c1) / (√(v / c2 + eps_root) + eps) + λ·p
             p ← p − lr·φ·u                                     φ = η·‖p‖ / ‖u‖
    LARS     u ← g + λ·p
             b ← μ·b + lr·φ·u                                   φ = η·‖p‖ / (‖u‖ + eps)
             p ← p − b
      Nesterov p ← p − (lr·φ·u + μ·b)

φ = 1 where either norm is zero. Norms are those of the float32 elements, correctly rounded to float32. Where u is tiny
φ is beyond float32, and lr·φ·u is not: then lr carries a part of φ. optax's own norms are 0 there. optax keeps LARS's
buffer with the opposite sign.

Sources: You et al. 2020, algorithm 2 (whose trust ratio also bounds ‖p‖, which optax leaves out); You, Gitman &
Ginsburg 2017; the code of optax 0.2.8.
"""

from __future__ import annotations

from typing import Final, cast

from numpy import sqrt

from stepwire.optimizers import LARGEST_NUMBER, Hyperparameters
from stepwire_server.rules.moments import second_moment, weighted_mean
from stepwire_server.rules.rule import Rule, Value

__all__ = ["LAMB", "LARS", "LARS_NESTEROV", "lamb", "lamb_direction", "lars", "lars_direction", "lars_nesterov"]


def towards(
    m: Value, v: Value, p: Value, inverse1: Value, c2: Value, eps_root: Value, eps: Value, decay: Value
) -> Value:
    """Return Adam's direction with decay; inverse1 = 1 / c1."""
    return inverse1 * m / (sqrt(v / c2 + eps_root) + eps) + decay * p


def lamb_direction(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    beta1: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    inverse1: Value,
    c2: Value,
    eps_root: Value,
    eps: Value,
    decay: Value,
    lr: Value,
) -> Value:
    """Return u. See the module."""
    m = weighted_mean(m, g, beta1, rate1)
    v = second_moment(v, g, beta2, rate2)
    return towards(m, v, p, inverse1, c2, eps_root, eps, decay)


def lamb(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    beta1: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    inverse1: Value,
    c2: Value,
    eps_root: Value,
    eps: Value,
    decay: Value,
    lr: Value,
    trust: Value,
) -> tuple[Value, Value, Value]:
    """Follow u by lr·φ. See the module."""
    m = weighted_mean(m, g, beta1, rate1)
    v = second_moment(v, g, beta2, rate2)
    return p - lr * (trust * towards(m, v, p, inverse1, c2, eps_root, eps, decay)), m, v


def lars_direction(p: Value, g: Value, b: Value, decay: Value, momentum: Value, lr: Value) -> Value:
    """Return u. See the module."""
    return g + decay * p


def lars(p: Value, g: Value, b: Value, decay: Value, momentum: Value, lr: Value, trust: Value) -> tuple[Value, Value]:
    """Follow the momentum of lr·φ·u. See the module."""
    b = momentum * b + lr * (trust * (g + decay * p))
    return p - b, b


def lars_nesterov(
    p: Value, g: Value, b: Value, decay: Value, momentum: Value, lr: Value, trust: Value
) -> tuple[Value, Value]:
    """Look ahead along the momentum of lr·φ·u. See the module."""
    u = lr * (trust * (g + decay * p))
    b = momentum * b + u
    return p - (u + momentum * b), b


def _lamb_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    beta1, beta2 = float(cast(float, hyper.beta1)), float(cast(float, hyper.beta2))
    return (
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        1.0 / (1.0 - beta1**t),
        1.0 - beta2**t,
        float(cast(float, hyper.eps_root)),
        float(cast(float, hyper.eps)),
        float(cast(float, hyper.weight_decay)),
        float(hyper.lr),
    )


def _lars_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    return (float(cast(float, hyper.weight_decay)), float(cast(float, hyper.momentum)), float(hyper.lr))


def _trust(hyper: Hyperparameters, param_norm: float, direction_norm: float, eps: float) -> tuple[float, float]:
    """Return lr and φ, whose product is the factor of u."""
    lr = float(hyper.lr)
    if param_norm == 0.0 or direction_norm == 0.0:
        return lr, 1.0
    trust = float(cast(float, hyper.trust_coefficient)) * param_norm / (direction_norm + eps)
    if trust <= LARGEST_NUMBER:
        return lr, trust
    return min(lr * (trust / LARGEST_NUMBER), LARGEST_NUMBER), LARGEST_NUMBER


def _lamb_trust(hyper: Hyperparameters, param_norm: float, direction_norm: float) -> tuple[float, float]:
    return _trust(hyper, param_norm, direction_norm, 0.0)


def _lars_trust(hyper: Hyperparameters, param_norm: float, direction_norm: float) -> tuple[float, float]:
    return _trust(hyper, param_norm, direction_norm, float(cast(float, hyper.eps)))


LAMB: Final = Rule(
    "lamb",
    lamb,
    ("exp_avg", "exp_avg_sq"),
    _lamb_scalars,
    direction=lamb_direction,
    trust=_lamb_trust,
)
LARS: Final = Rule("lars", lars, ("momentum_buffer",), _lars_scalars, direction=lars_direction, trust=_lars_trust)
LARS_NESTEROV: Final = Rule(
    "lars_nesterov",
    lars_nesterov,
    ("momentum_buffer",),
    _lars_scalars,
    direction=lars_direction,
    trust=_lars_trust,
)
