"""One side of a program: parameters, an optimizer, and whatever a script has beside it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

import stepwire
import stepwire.torch

__all__ = ["RULES", "WAYS", "World"]

RULES: dict[str, dict[str, Any]] = {
    "Adam": {},
    "Adam amsgrad": {"amsgrad": True, "weight_decay": 0.01},
    "AdamW": {},
    "SGD": {"weight_decay": 0.01},
    "SGD momentum": {"momentum": 0.9, "dampening": 0.1},
    "SGD nesterov": {"momentum": 0.8, "nesterov": True},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adagrad": {"lr_decay": 0.01, "initial_accumulator_value": 0.1},
    "Adadelta": {"weight_decay": 0.01},
    "RAdam": {},
    "Adamax": {},
}
"""Options by a name, whose first word is the class."""

WAYS: dict[str, dict[str, Any]] = {
    "tcp": {"transport": "tcp"},
    "memory": {"transport": "shm"},
    "views": {"transport": "shm", "shared_views": True},
    "early": {"transport": "tcp", "send_in_backward": True},
}

SHAPES = ((7, 5), (9,), (), (40, 33), (3, 2, 4))


class World:
    """A script's objects. Both sides of a program draw the same numbers.

    Attributes:
        remote: the options of the drop-in; None for torch's own optimizer.
        params: the model's parameters, in order.
        optimizer: the optimizer.
        schedulers: the schedulers.
        scaler: the scaler of the loss; None before there is one.
        held: tensors of the state that the script keeps in variables.
        saved: the last checkpoint: values and a state dict; None before there is one.
    """

    def __init__(self, rule: str, seed: int, remote: dict[str, Any] | None) -> None:
        self._rule = rule
        self.remote = remote
        rng = random.Random(seed)
        count = rng.randint(1, len(SHAPES))
        self.params = [self.parameter(rng, shape) for shape in rng.sample(SHAPES, count)]
        self.optimizer: Any = self.made()
        self.schedulers: list[Any] = []
        self.scaler: Any = None
        self.held: list[Any] = []
        self.saved: Any = None

    def made(self, **options: Any) -> Any:
        """Make an optimizer of the parameters that the model has now."""
        name, module = self._rule.split()[0], torch.optim if self.remote is None else stepwire.torch
        options = {**RULES[self._rule], **(self.remote or {}), **options}
        return getattr(module, name)(list(self.params), lr=0.05, **options)

    def close(self) -> None:
        if self.remote is not None:
            self.optimizer.close()

    def parameter(self, rng: random.Random, shape: tuple[int, ...] = (11,)) -> Parameter:
        return Parameter(self.tensor(rng, shape))

    def tensor(self, rng: random.Random, shape: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        return torch.randn(tuple(shape), generator=generator)

    def stepped(self) -> list[Parameter]:
        """Return the parameters of the groups, in order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def backward(self, rng: random.Random, factor: Any = 1.0) -> None:
        """Make gradients, for most of the parameters, of a loss that is multiplied by a factor."""
        terms = [
            (parameter * self.tensor(rng, parameter.shape).to(parameter.dtype)).sum()
            for parameter in self.params
            if parameter.requires_grad and rng.random() < 0.9
        ]
        if terms:
            (sum(terms) * factor).backward()

    def on_the_server(self, act: Callable[[Any], Any]) -> None:
        """Do something to the drop-in alone."""
        if self.remote is not None:
            act(self.optimizer)
