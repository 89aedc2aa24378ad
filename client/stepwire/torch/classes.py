"""The optimizers: the classes of torch, and classes like torch's for rules that torch does not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from stepwire.torch.optimizer import RemoteOptimizer

__all__ = ["LAMB", "LARS", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Lion", "NAdam", "RAdam", "RMSprop"]


class Adam(RemoteOptimizer, torch.optim.Adam):
    """`torch.optim.Adam` on a server; for the formula see `stepwire.Adam`, for the options `RemoteOptions`."""


class AdamW(RemoteOptimizer, torch.optim.AdamW):
    """`torch.optim.AdamW` on a server; for the formula see `stepwire.AdamW`, for the options `RemoteOptions`."""


class NAdam(RemoteOptimizer, torch.optim.NAdam):
    """`torch.optim.NAdam` on a server; see `stepwire.NAdam` and `RemoteOptions`."""


class RAdam(RemoteOptimizer, torch.optim.RAdam):
    """`torch.optim.RAdam` on a server; see `stepwire.RAdam` and `RemoteOptions`."""


class Adamax(RemoteOptimizer, torch.optim.Adamax):
    """`torch.optim.Adamax` on a server; see `stepwire.Adamax` and `RemoteOptions`."""


class SGD(RemoteOptimizer, torch.optim.SGD):
    """`torch.optim.SGD` on a server; see `stepwire.SGD` and `RemoteOptions`."""


class RMSprop(RemoteOptimizer, torch.optim.RMSprop):
    """`torch.optim.RMSprop` on a server; see `stepwire.RMSprop` and `RemoteOptions`."""


class Adagrad(RemoteOptimizer, torch.optim.Adagrad):
    """`torch.optim.Adagrad` on a server; see `stepwire.Adagrad` and `RemoteOptions`."""


class Adadelta(RemoteOptimizer, torch.optim.Adadelta):
    """`torch.optim.Adadelta` on a server; see `stepwire.Adadelta` and `RemoteOptions`."""


class _Lion(torch.optim.Optimizer):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)


class Lion(RemoteOptimizer, _Lion):
    """Lion on a server; torch has none. See `stepwire.Lion` and `RemoteOptions`."""


class _LAMB(torch.optim.Optimizer):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 1.0,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient, "maximize": maximize})


class LAMB(RemoteOptimizer, _LAMB):
    """LAMB on a server; torch has none. See `stepwire.LAMB` and `RemoteOptions`."""


class _LARS(torch.optim.Optimizer):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps, "nesterov": nesterov}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient, "maximize": maximize})


class LARS(RemoteOptimizer, _LARS):
    """LARS on a server; torch has none. See `stepwire.LARS` and `RemoteOptions`."""
