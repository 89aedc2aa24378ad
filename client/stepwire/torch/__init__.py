"""Optimizers for PyTorch with their state and arithmetic on a stepwire server: change one import.

    from stepwire.torch import AdamW

    optimizer = AdamW(model.parameters(), lr=3e-4, server="host:50051")

The classes are `torch.optim.Optimizer`s, with torch's own constructors, parameter groups and state dicts. Schedulers,
`GradScaler`, hooks and checkpoints work unchanged. docs/torch.md lists the differences and the refusals.
"""

from __future__ import annotations

try:
    import torch as _torch
except ImportError as missing:
    raise ImportError(
        "stepwire.torch needs PyTorch, which is not installed: pip install 'stepwire[torch]'", name="torch"
    ) from missing

from stepwire.torch.classes import (
    LAMB,
    LARS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
)
from stepwire.torch.optimizer import RemoteOptimizer
from stepwire.torch.options import RemoteOptions
from stepwire.torch.refused import refusal

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "RemoteOptimizer",
    "RemoteOptions",
]

_OF_TORCH = ("Optimizer", "lr_scheduler", "swa_utils")  # these work with this package's optimizers as they are


def __getattr__(name: str) -> object:
    """Return torch's own schedulers and the like, or a function that refuses an optimizer with the reason.

    Raises:
        AttributeError: the name is none of `torch.optim`'s.
    """
    if name in _OF_TORCH:
        return getattr(_torch.optim, name)
    if (refused := refusal(name)) is not None:
        return refused
    raise AttributeError(f"module 'stepwire.torch' has no attribute {name!r}")
