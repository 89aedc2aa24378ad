"""SGD as torch computes it, and Lion.

With momentum buffer b, momentum μ and dampening τ:

    SGD        p ← p − lr·g
      momentum b ← g at its first use, else μ·b + (1 − τ)·g
               p ← p − lr·b
      Nesterov p ← p − lr·(g + μ·b)
    Lion       u ← sign(β1·m + (1 − β1)·g)
               m ← β2·m + (1 − β2)·g
               p ← p − lr·u

A buffer is used where μ > 0. Where μ is 0 the plain form steps, and leaves b as it is. The rule's scalar of a tensor is
1 once its buffer has begun, and 0 before.

Sources: Sutskever et al. 2013 and the code of torch 2.13 (whose lr scales the buffer, and whose first buffer is not
dampened); Chen et al. 2023, algorithm 2, and the code of optax 0.2.8.
"""

from __future__ import annotations

from typing import Final, cast

from numpy import sign

from stepwire.optimizers import Hyperparameters
from stepwire_server.rules.rule import Rule, TensorScalar, Value

__all__ = ["LION", "SGD", "SGD_MOMENTUM", "SGD_NESTEROV", "lion", "sgd", "sgd_momentum", "sgd_nesterov"]


def sgd(p: Value, g: Value, lr: Value) -> tuple[Value]:
    """Follow the gradient. See the module."""
    return (p - lr * g,)


def sgd_momentum(p: Value, g: Value, b: Value, momentum: Value, rate: Value, lr: Value) -> tuple[Value, Value]:
    """Follow the momentum; rate = 1 at its first use, else 1 − τ. See the module."""
    b = momentum * b + rate * g
    return p - lr * b, b


def sgd_nesterov(p: Value, g: Value, b: Value, momentum: Value, rate: Value, lr: Value) -> tuple[Value, Value]:
    """Look ahead along the momentum. See the module."""
    b = momentum * b + rate * g
    return p - lr * (g + momentum * b), b


def lion(
    p: Value, g: Value, m: Value, beta1: Value, rate1: Value, beta2: Value, rate2: Value, lr: Value
) -> tuple[Value, Value]:
    """Follow the sign of an interpolated momentum; rate1 = 1 − β1, rate2 = 1 − β2. See the module."""
    u = sign(beta1 * m + rate1 * g)
    return p - lr * u, beta2 * m + rate2 * g


def _sgd_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    return (float(hyper.lr),)


def _begun(hyper: Hyperparameters, t: int) -> float:
    return 1.0 if t and hyper.momentum else 0.0


def _begins(hyper: Hyperparameters, t: int, begun: float) -> float:
    return 1.0


def _momentum_scalars(hyper: Hyperparameters, t: int, begun: float | None = None) -> tuple[float, ...]:
    used = _begun(hyper, t - 1) if begun is None else begun
    rate = 1.0 - float(hyper.dampening or 0.0) if used else 1.0
    return (float(cast(float, hyper.momentum)), rate, float(hyper.lr))


def _lion_scalars(hyper: Hyperparameters, t: int) -> tuple[float, ...]:
    beta1, beta2 = float(cast(float, hyper.beta1)), float(cast(float, hyper.beta2))
    return (beta1, 1.0 - beta1, beta2, 1.0 - beta2, float(hyper.lr))


SGD: Final = Rule("sgd", sgd, (), _sgd_scalars)
_BEGUN: Final = TensorScalar(_begins, _begun)
SGD_MOMENTUM: Final = Rule("sgd_momentum", sgd_momentum, ("momentum_buffer",), _momentum_scalars, tensor_scalar=_BEGUN)
SGD_NESTEROV: Final = Rule("sgd_nesterov", sgd_nesterov, ("momentum_buffer",), _momentum_scalars, tensor_scalar=_BEGUN)
LION: Final = Rule("lion", lion, ("exp_avg",), _lion_scalars)
