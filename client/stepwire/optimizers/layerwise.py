"""Optimizers that scale the step of each tensor by the norm of the parameter over the norm of the update."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from stepwire.optimizers.optimizer import Formula, Optimizer, TwoBetas

__all__ = ["LAMB", "LARS"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAMB(TwoBetas):
    """Layerwise Adam for large batches (You et al., 2020) as `optax.lamb` has it.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        betas: as Adam's.
        eps: added to the denominator, finite, ≥ 0.
        eps_root: added inside the root, finite, ≥ 0.
        weight_decay: times the parameter, added to Adam's direction, finite, ≥ 0.
        trust_coefficient: factor of the trust ratio, finite, > 0.
        maximize: ascend instead of descend.
    """

    rule: ClassVar[str] = "lamb"
    published: ClassVar[Formula] = "optax"

    eps: float = 1e-6
    eps_root: float = 0.0
    trust_coefficient: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LARS(Optimizer):
    """Layerwise SGD for large batches (You, Gitman & Ginsburg, 2017) as `optax.lars` has it.

    Attributes:
        lr: learning rate, finite, ≥ 0.
        momentum: weight of the past, in [0, 1).
        weight_decay: times the parameter, added to the gradient, finite, ≥ 0.
        trust_coefficient: factor of the trust ratio, finite, > 0.
        eps: added to the norm of the update in the trust ratio, finite, ≥ 0.
        nesterov: look ahead along the momentum.
        maximize: ascend instead of descend.
    """

    rule: ClassVar[str] = "lars"
    published: ClassVar[Formula] = "optax"

    lr: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    trust_coefficient: float = 1e-3
    eps: float = 0.0
    nesterov: bool = False
    maximize: bool = False
