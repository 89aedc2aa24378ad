"""Optimizers that follow the gradient or its sign, with at most one moment."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from stepwire.errors import InvalidRequestError
from stepwire.optimizers.hyperparameters import Hyperparameters
from stepwire.optimizers.optimizer import Formula, Optimizer, TwoBetas

__all__ = ["SGD", "Lion"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent as `torch.optim.SGD` has it.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        momentum: weight of the past, in [0, 1). Without any, in any group, no buffer is kept.
        dampening: fraction of the gradient that momentum leaves out after the first update, in [0, 1]; needs momentum.
        weight_decay: added to the gradient (L2), finite, ≥ 0.
        nesterov: look ahead along the momentum; needs momentum and no dampening.
        maximize: ascend instead of descend.
    """

    rule: ClassVar[str] = "sgd"

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    def check_numbers(self, numbers: Hyperparameters, field: str) -> None:
        """See `Optimizer.check_numbers`."""
        super().check_numbers(numbers, field)
        if self.nesterov and (not numbers.momentum or numbers.dampening):
            raise InvalidRequestError.of(
                f"{field}.momentum",
                f"momentum is {numbers.momentum!r} and dampening {numbers.dampening!r}; nesterov needs momentum > 0 "
                "and dampening 0",
            )
        if numbers.dampening and not numbers.momentum:
            raise InvalidRequestError.of(
                f"{field}.dampening",
                f"dampening is {numbers.dampening!r} and momentum 0, and without momentum dampening does nothing; set "
                "momentum, or leave dampening out",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(TwoBetas):
    """The sign of an interpolated momentum (Chen et al., 2023); decay is decoupled. As `optax.lion`.

    Attributes:
        lr: learning rate, finite, ≥ 0; about a tenth of Adam's.
        betas: weights of the past in the step's direction and in the momentum kept, each in [0, 1).
        weight_decay: subtracted from the parameter, finite, ≥ 0.
        maximize: ascend instead of descend.
    """

    rule: ClassVar[str] = "lion"
    published: ClassVar[Formula] = "optax"

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
