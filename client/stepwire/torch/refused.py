"""The optimizers of torch that this package lacks: functions that refuse with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

from stepwire.errors import UnsupportedFeatureError

__all__ = ["refusal"]

_NO_RULE: Final = "a server has no such rule; use torch.optim.{name}, with its state in this process"
_REASONS: Final = {
    "ASGD": _NO_RULE,
    "Adafactor": _NO_RULE,
    "LBFGS": "it evaluates the model several times in one step, and a step has one gradient; use torch.optim.LBFGS",
    "Muon": _NO_RULE,
    "Rprop": _NO_RULE,
    "SparseAdam": "sparse rows are not served; use torch.optim.SparseAdam for the sparse parameters",
}


def refusal(name: str) -> Callable[..., NoReturn] | None:
    """Return a function that refuses an optimizer of torch when it is called; None for other names."""
    if name not in _REASONS:
        return None
    reason = _REASONS[name].format(name=name)

    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedFeatureError(
            f"{name}: stepwire.torch does not have it: {reason}", metadata={"field": name, "feature": name}
        )

    refused.__name__ = refused.__qualname__ = name
    refused.__doc__ = f"Refuse `torch.optim.{name}`: {reason}."
    return refused
