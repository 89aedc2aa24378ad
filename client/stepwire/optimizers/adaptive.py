"""Optimizers that scale the gradient by its mean or summed square alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.hyperparameters import number
from stepwire.optimizers.optimizer import Optimizer

__all__ = ["Adadelta", "Adagrad", "RMSprop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSprop(Optimizer):
    """RMSprop (Hinton, 2012; Graves, 2013) as `torch.optim.RMSprop` has it: eps outside the root.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        alpha: weight of the past in the mean square, in [0, 1).
        eps: added to the denominator, finite, ≥ 0.
        weight_decay: added to the gradient (L2), finite, ≥ 0.
        momentum: weight of the past, in [0, 1). Without any, in any group, no buffer is kept.
        centered: divide by the standard deviation instead of the root mean square; needs float32 moments.
        maximize: ascend instead of descend.
    """

    rule: ClassVar[str] = "rmsprop"

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    maximize: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adagrad(Optimizer):
    """Adagrad (Duchi, Hazan & Singer, 2011) as `torch.optim.Adagrad` has it.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        lr_decay: the rate is lr / (1 + (t − 1)·lr_decay), finite, ≥ 0.
        weight_decay: added to the gradient (L2), finite, ≥ 0.
        initial_accumulator_value: the first value of the sum of squares, finite, ≥ 0.
        eps: added to the denominator, finite, ≥ 0.
        maximize: ascend instead of descend.
    """

    rule: ClassVar[str] = "adagrad"
    synonyms: ClassVar = {"decay": "lr_decay"}

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    maximize: bool = False

    def __post_init__(self) -> None:
        """Refuse a value out of range with an error that names the value."""
        super().__post_init__()
        field = "optimizer.initial_accumulator_value"
        value = number(self.initial_accumulator_value, field)
        if not 0.0 <= value <= 3e38:
            raise InvalidRequestError.of(field, f"initial_accumulator_value is {value!r}; it must be in [0, 3e38]")
        object.__setattr__(self, "initial_accumulator_value", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adadelta(Optimizer):
    """Adadelta (Zeiler, 2012) as `torch.optim.Adadelta` has it.

    Attributes:
        lr: factor of the update, finite, ≥ 0.
        rho: weight of the past in both mean squares, in [0, 1).
        eps: added inside both roots, finite, ≥ 0.
        weight_decay: added to the gradient (L2), finite, ≥ 0.
        maximize: ascend instead of descend.
    """

    rule: ClassVar[str] = "adadelta"
    synonyms: ClassVar = {"alpha": "rho"}

    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0
    maximize: bool = False
