"""The configurations with which PyTorch tests its own optimizers."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["RULES", "Input", "error_inputs", "inputs", "supports_complex"]

RULES = ("Adam", "AdamW", "SGD", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta")
"""The optimizers of torch that have a twin here."""

_DEVICES = ("cpu", "cuda")
"""The device of torch's cases; a case's device makes no difference to a server."""


class Input(NamedTuple):
    """One case.

    Attributes:
        rule: the class.
        arguments: of its constructor.
        description: torch's own words.
    """

    rule: str
    arguments: dict[str, Any]
    description: str


def inputs(rule: str) -> list[Input]:
    """Return every case that torch lists for a class, each with foreach, fused and differentiable."""
    found: dict[str, Input] = {}
    for device in _DEVICES:
        for listed in _database()._get_optim_inputs_including_global_cliquey_kwargs(device, None, _info(rule)):
            found.setdefault(repr(listed.kwargs), Input(rule, listed.kwargs, listed.desc))
    return list(found.values())


def error_inputs(rule: str) -> list[Any]:
    """Return the inputs that torch refuses, as its `ErrorOptimizerInput`."""
    import torch

    refused: list[Any] = _info(rule).optim_error_inputs_func(device="cpu", dtype=torch.float32)
    return refused


def supports_complex(rule: str) -> bool:
    """Tell whether torch has the class for complex parameters."""
    return bool(_info(rule).supports_complex)


def _info(rule: str) -> Any:
    return next(info for info in _database().optim_db if info.name == rule)


def _database() -> Any:
    # The import needs seconds, so the module is imported in the tests that use it and not at collection.
    from torch.testing._internal import common_optimizers

    return common_optimizers
