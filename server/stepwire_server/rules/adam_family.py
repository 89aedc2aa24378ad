"""NAdam, RAdam and AdaMax as torch computes them.

With m, v, c1, c2 as Adam's, and ψ the momentum decay:

    NAdam    μₜ = β1·(1 − ½·0.96^(t·ψ)),  Πₜ = μ1·μ2·…·μₜ
             p ← p − lr·(1 − μₜ) / (1 − Πₜ)·(g / (√(v / c2) + eps)) − lr·μₜ₊₁ / (1 − Πₜ₊₁)·(m / (√(v / c2) + eps))
    RAdam    ρ∞ = 2 / (1 − β2) − 1,  ρₜ = ρ∞ − 2·t·β2ᵗ / c2
             p ← p − (lr / c1)·m·rₜ·√c2 / (√v + eps)      rₜ² = (ρₜ−4)(ρₜ−2)ρ∞ / ((ρ∞−4)(ρ∞−2)ρₜ)     where ρₜ > 5
             p ← p − (lr / c1)·m                                                                   elsewhere
    AdaMax   x ← max(β2·x, |g| + eps)
             p ← p − (lr / c1)·m / x

Πₜ is a running product, as in torch: each μ is of the β1 and ψ of its own update. It is the rule's scalar of a tensor,
kept with the session in float64. The RAdam paper rectifies where ρₜ > 4; torch's documentation says 5, and its code
does so.

Sources: Dozat 2016; Liu et al. 2020, algorithm 2; Kingma & Ba 2015, algorithm 2; the code of torch 2.13.
"""

from __future__ import annotations

import math
from typing import Final, cast

from numpy import absolute, maximum, minimum, sqrt

from stepwire.optimizers import Hyperparameters
from stepwire_server.rules.moments import first_moment, second_moment
from stepwire_server.rules.rule import Rule, TensorScalar, Value

__all__ = ["ADAMAX", "NADAM", "RADAM", "adamax", "nadam", "radam"]


def nadam(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    gradient_size: Value,
    next_size: Value,
    correction2: Value,
    eps: Value,
) -> tuple[Value, Value, Value]:
    """Update with Nesterov momentum in two moves, of g and of m, by their sizes. See the module."""
    m = first_moment(m, g, rate1)
    v = second_moment(v, g, beta2, rate2)
    divisor = sqrt(v / correction2) + eps
    return p - gradient_size * (g / divisor) - next_size * (m / divisor), m, v


def radam(
    p: Value,
    g: Value,
    m: Value,
    v: Value,
    rate1: Value,
    beta2: Value,
    rate2: Value,
    step_size: Value,
    eps: Value,
    least: Value,
    most: Value,
) -> tuple[Value, Value, Value]:
    """Update with a rectified step; least and most bound the divisor: both are 1 where it is none. See the module."""
    m = first_moment(m, g, rate1)
    v = second_moment(v, g, beta2, rate2)
    return p - step_size * (m / minimum(maximum(sqrt(v) + eps, least), most)), m, v


def adamax(
    p: Value,
    g: Value,
    m: Value,
    x: Value,
    rate1: Value,
    beta2: Value,
    step_size: Value,
    eps: Value,
) -> tuple[Value, Value, Value]:
    """Update by the largest gradient so far. See the module."""
    m = first_moment(m, g, rate1)
    x = maximum(beta2 * x, absolute(g) + eps)
    return p - step_size * m / x, m, x


def _betas(hyper: Hyperparameters) -> tuple[float, float]:
    return float(cast(float, hyper.beta1)), float(cast(float, hyper.beta2))


def _momentum(beta1: float, decay: float, t: int) -> float:
    warmth: float = 0.96 ** (t * decay)
    return beta1 * (1.0 - 0.5 * warmth)


def _momentum_product(hyper: Hyperparameters, t: int) -> float:
    """Return μ1·…·μₜ for numbers that never changed, as a load may need it that brings t alone.

    t may be anything, so the loop has to end early. With a slow warm-up the product falls below the last bit of 1 − Πₜ
    within a few thousand factors. With a fast one μ becomes β1 as soon.
    """
    (beta1, _), decay, product = _betas(hyper), float(cast(float, hyper.decay)), 1.0
    for step in range(1, t + 1):
        if product < 2.0**-60:
            break
        if 0.96 ** (step * decay) < 2.0**-60:
            return product * beta1 ** (t - step + 1)
        product *= _momentum(beta1, decay, step)
    return product


def _following_product(hyper: Hyperparameters, t: int, product: float) -> float:
    return product * _momentum(_betas(hyper)[0], float(cast(float, hyper.decay)), t)


def _nadam_scalars(hyper: Hyperparameters, t: int, product_before: float | None = None) -> tuple[float, ...]:
    (beta1, beta2), lr, decay = _betas(hyper), float(hyper.lr), float(cast(float, hyper.decay))
    now, following = _momentum(beta1, decay, t), _momentum(beta1, decay, t + 1)
    product = now * (_momentum_product(hyper, t - 1) if product_before is None else product_before)
    gradient_size = lr * (1.0 - now) / (1.0 - product)
    next_size = lr * following / (1.0 - product * following)
    return (
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        gradient_size,
        next_size,
        1.0 - beta2**t,
        float(cast(float, hyper.eps)),
    )


def _radam_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    (beta1, beta2), eps = _betas(hyper), float(cast(float, hyper.eps))
    step_size, c2 = float(hyper.lr) / (1.0 - beta1**t), 1.0 - beta2**t
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * t * beta2**t / c2
    rates = (1.0 - beta1, beta2, 1.0 - beta2)
    if not rho > 5.0:
        return (*rates, step_size, eps, 1.0, 1.0)
    rect = math.sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))
    return (*rates, step_size * rect * math.sqrt(c2), eps, 0.0, math.inf)


def _adamax_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    beta1, beta2 = _betas(hyper)
    return (1.0 - beta1, beta2, float(hyper.lr) / (1.0 - beta1**t), float(cast(float, hyper.eps)))


_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
_MEANS: Final = (("exp_avg", "beta1"), ("exp_avg_sq", "beta2"))

NADAM: Final = Rule(
    "nadam", nadam, _MOMENTS, _nadam_scalars, _MEANS, TensorScalar(_following_product, _momentum_product)
)
RADAM: Final = Rule("radam", radam, _MOMENTS, _radam_scalars, _MEANS)
ADAMAX: Final = Rule("adamax", adamax, ("exp_avg", "exp_inf"), _adamax_scalars, _MEANS[:1])
