"""Optimizers for PyTorch with their state and arithmetic on a stepwire server: change one import.

    from stepwire.torch import AdamW

    optimizer = AdamW(model.parameters(), lr=3e-4, server="host:50051")

The classes are `torch.optim.Optimizer`s, with torch's own constructors, parameter groups and state dicts. Schedulers,
`GradScaler`, hooks and checkpoints work unchanged. docs/torch.md lists the differences and the refusals.

`import stepwire.torch as optim` serves a script in the place of `from torch import optim`: `Optimizer`, `lr_scheduler`
and `swa_utils` are torch's, and a class that is not served says the reason when it is made.
"""

from __future__ import annotations

from typing import Any

try:
    import torch as _torch
except ImportError as missing:
    raise ImportError(
        "stepwire.torch needs PyTorch, which is not installed: pip install torch", name="torch"
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
from stepwire.torch.embedding import RemoteEmbedding, RemoteEmbeddingBag
from stepwire.torch.local_sgd import LocalSGD
from stepwire.torch.optimizer import RemoteOptimizer
from stepwire.torch.options import RemoteOptions
from stepwire.torch.refused import refused_class
from stepwire.torch.sparse import SparseAdam

Optimizer = _torch.optim.Optimizer
lr_scheduler = _torch.optim.lr_scheduler
swa_utils = _torch.optim.swa_utils

del _torch

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
    "LocalSGD",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "RemoteEmbedding",
    "RemoteEmbeddingBag",
    "RemoteOptimizer",
    "RemoteOptions",
    "SparseAdam",
    "lr_scheduler",
    "swa_utils",
]


def __getattr__(name: str) -> Any:
    """Return a class of torch.optim that is not served, and says the reason when it is made."""
    if (refused := refused_class(name)) is not None:
        return refused
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
