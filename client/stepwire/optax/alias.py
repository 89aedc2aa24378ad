"""The constructors, by optax's names, with optax's arguments, defaults and formulas.

An argument of optax that a server does not serve is refused by name; no argument is ignored. This module does not have
the rules that differ between optax and the server under one name (see the package).
"""

from __future__ import annotations

from typing import Any, Unpack

import jax
import numpy as np

from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire.optax.connection import TransformationOptions
from stepwire.optax.transformation import LearningRate, RemoteTransformation, transformation, undecayed
from stepwire.optimizers import LAMB, LARS, SGD, Adadelta, Adam, Adamax, AdamW, Lion, RMSprop

__all__ = [
    "adadelta",
    "adam",
    "adamax",
    "adamw",
    "amsgrad",
    "lamb",
    "lars",
    "lion",
    "nadam",
    "nadamw",
    "rmsprop",
    "sgd",
]


def adam(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = False,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """Adam as `optax.adam` computes it.

    Args:
        learning_rate: a number, a schedule, or a scalar of JAX's.
        b1: weight of the past in the first moment, in [0, 1). A larger weight is smoother and steadier, a smaller one
            follows the gradient more closely.
        b2: weight of the past in the second moment, in [0, 1).
        eps: added to the root.
        eps_root: added inside the root.
        mu_dtype: None or float32; `state_precision="bfloat16"` has both moments in bfloat16.
        nesterov: look ahead by one step.
        options: see `TransformationOptions`.

    Returns:
        The transformation.

    Raises:
        InvalidRequestError: a value is out of range, or traced.
    """
    _check_dtype("mu_dtype", mu_dtype)
    _check_numbers(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    rule = Adam(betas=(b1, b2), eps=eps, eps_root=eps_root, nesterov=nesterov, formula="optax")
    return transformation(rule, learning_rate, options, None)


def nadam(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    *,
    nesterov: bool = True,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """Adam with Nesterov momentum as `optax.nadam` computes it; see `adam`."""
    return adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, **options)


def adamw(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """Adam with decoupled weight decay as `optax.adamw` computes it; see `adam`.

    Args:
        learning_rate: a number, a schedule, or a scalar of JAX's.
        b1: weight of the past in the first moment.
        b2: weight of the past in the second moment.
        eps: added to the root.
        eps_root: added inside the root.
        mu_dtype: None or float32.
        weight_decay: factor of the decay, which is also proportional to the learning rate. A number, not a schedule.
        mask: the parameters that decay: a tree of bools, a prefix of such a tree, or a function of the parameters.
        nesterov: look ahead by one step.
        options: see `TransformationOptions`.

    Returns:
        The transformation.
    """
    _check_dtype("mu_dtype", mu_dtype)
    _check_numbers(b1=b1, b2=b2, eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    rule = AdamW(
        betas=(b1, b2),
        eps=eps,
        eps_root=eps_root,
        weight_decay=weight_decay,
        nesterov=nesterov,
        formula="optax",
    )
    return transformation(rule, learning_rate, options, undecayed(mask, "mask"))


def nadamw(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = True,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """Nesterov Adam with decoupled weight decay as `optax.nadamw` computes it; see `adamw`."""
    return adamw(learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov, **options)


def amsgrad(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """AMSGrad of the bias-corrected second moment as `optax.amsgrad` computes it; see `adam`.

    Raises:
        UnsupportedFeatureError: a bias correction is off.
    """
    _check_dtype("mu_dtype", mu_dtype)
    _check_numbers(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    _only("bias_correction_mu", bias_correction_mu, True, "the server's AMSGrad of optax's form corrects both moments")
    _only("bias_correction_nu", bias_correction_nu, True, "the server's AMSGrad of optax's form corrects both moments")
    rule = Adam(betas=(b1, b2), eps=eps, eps_root=eps_root, amsgrad="corrected", formula="optax")
    return transformation(rule, learning_rate, options, None)


def adamax(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """Adam by the largest gradient as `optax.adamax` computes it."""
    _check_numbers(b1=b1, b2=b2, eps=eps)
    return transformation(Adamax(betas=(b1, b2), eps=eps), learning_rate, options, None)


def sgd(
    learning_rate: LearningRate,
    momentum: float | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """Gradient descent, perhaps with momentum, as `optax.sgd` computes it."""
    _check_dtype("accumulator_dtype", accumulator_dtype)
    _check_numbers(momentum=0.0 if momentum is None else momentum)
    looks_ahead = nesterov and bool(momentum)  # Nesterov's rule needs a momentum
    rule = SGD(momentum=momentum or 0.0, nesterov=looks_ahead)
    return transformation(rule, learning_rate, options, None)


def lion(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.99,
    mu_dtype: Any = None,
    weight_decay: float = 1e-3,
    mask: Any = None,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """Lion as `optax.lion` computes it; `mask` as for `adamw`."""
    _check_dtype("mu_dtype", mu_dtype)
    _check_numbers(b1=b1, b2=b2, weight_decay=weight_decay)
    rule = Lion(betas=(b1, b2), weight_decay=weight_decay)
    return transformation(rule, learning_rate, options, undecayed(mask, "mask"))


def rmsprop(
    learning_rate: LearningRate,
    decay: float = 0.9,
    eps: float = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: float | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """RMSprop as `optax.rmsprop` computes it with `eps_in_sqrt=False`, which the caller has to pass.

    Raises:
        UnsupportedFeatureError: eps inside the root (optax's default), Nesterov momentum, bias correction, or another
            initial value than 0. Also momentum with a learning rate that changes, which optax's buffer contains.
    """
    _check_numbers(decay=decay, eps=eps, momentum=0.0 if momentum is None else momentum)
    _only("eps_in_sqrt", eps_in_sqrt, False, "the server's RMSprop adds eps to the root, as torch's does")
    _only("initial_scale", initial_scale, 0.0, "the server's mean square starts at zero")
    _only("nesterov", nesterov, False, "the server's RMSprop has plain momentum")
    _only("bias_correction", bias_correction, False, "the server's RMSprop has none")
    if momentum and (callable(learning_rate) or isinstance(learning_rate, jax.Array)):
        raise _unserved(
            "momentum",
            "optax's buffer contains the learning rates of all steps, and the server's does not; use a number as "
            "learning rate, or no momentum",
        )
    rule = RMSprop(alpha=decay, eps=eps, centered=centered, momentum=momentum or 0.0)
    return transformation(rule, learning_rate, options, None)


def adadelta(
    learning_rate: LearningRate = None,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """Adadelta as `optax.adadelta` computes it; the mask as `adamw`'s.

    Raises:
        InvalidRequestError: there is no learning rate. Optax also omits its sign then, and ascends.
    """
    _check_numbers(rho=rho, eps=eps, weight_decay=weight_decay)
    if learning_rate is None:
        raise InvalidRequestError.of(
            "learning_rate", "is None, with which optax.adadelta ascends; use 1.0 for the rule of the paper"
        )
    rule = Adadelta(rho=rho, eps=eps, weight_decay=weight_decay)
    return transformation(rule, learning_rate, options, undecayed(weight_decay_mask, "weight_decay_mask"))


def lamb(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    eps_root: float = 0.0,
    weight_decay: float = 0.0,
    mask: Any = None,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """LAMB as `optax.lamb` computes it; `mask` as for `adamw`."""
    _check_numbers(b1=b1, b2=b2, eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    rule = LAMB(betas=(b1, b2), eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    return transformation(rule, learning_rate, options, undecayed(mask, "mask"))


def lars(
    learning_rate: LearningRate,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = True,
    trust_coefficient: float = 0.001,
    eps: float = 0.0,
    trust_ratio_mask: Any = True,
    momentum: float = 0.9,
    nesterov: bool = False,
    **options: Unpack[TransformationOptions],
) -> RemoteTransformation:
    """LARS as `optax.lars` computes it; `weight_decay_mask` as `adamw`'s mask.

    Raises:
        UnsupportedFeatureError: a mask of the trust ratio.
    """
    _check_numbers(weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps, momentum=momentum)
    _only("trust_ratio_mask", trust_ratio_mask, True, "the server scales every tensor by its trust ratio")
    rule = LARS(
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
        eps=eps,
        momentum=momentum,
        nesterov=nesterov,
    )
    return transformation(rule, learning_rate, options, undecayed(weight_decay_mask, "weight_decay_mask"))


def _check_numbers(**numbers: Any) -> None:
    """Refuse scalars of JAX's, which may change from step to step: every step sends the learning rate alone.

    Raises:
        InvalidRequestError: the message names the argument and the remedy.
    """
    for name, value in numbers.items():
        if isinstance(value, jax.Array):
            raise InvalidRequestError.of(
                name,
                "is a scalar of JAX's, which may change from step to step, and every step sends learning_rate alone. "
                "Pass a Python number, and with optax.inject_hyperparams a function of learning_rate alone",
            )


def _check_dtype(field: str, dtype: Any) -> None:
    if dtype is not None and np.dtype(dtype) != np.float32:
        raise _unserved(field, f"is {dtype!r}, and moments are float32; use state_precision='bfloat16' for all moments")


def _only(field: str, value: Any, served: Any, why: str) -> None:
    """Refuse another value of an argument than the server's.

    Raises:
        UnsupportedFeatureError: the message names the argument, its value and the value to use.
    """
    if value is not served and (isinstance(served, bool) or value != served):
        raise _unserved(field, f"is {value!r:.80}, and {why}; use {field}={served!r}")


def _unserved(field: str, problem: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(f"{field}: {problem}", metadata={"field": field, "feature": field})
