"""The classes and options of torch.optim that a server does not serve, and the reasons."""

from __future__ import annotations

import functools
from typing import Any, Final

import torch

from stepwire.errors import UnsupportedFeatureError

__all__ = ["REFUSED_OPTIONS", "refuse_options", "refused_class"]

REFUSED_OPTIONS: Final = {
    "differentiable": "no gradient flows through a step on a server",
    "capturable": "a CUDA graph cannot contain a call to a server",
}
"""Options of a group that a server cannot serve, and the reasons."""

_NO_RULE: Final = "the server has no such rule"
_REASONS: Final = {
    "LBFGS": "it evaluates the model several times in one step",
}


@functools.cache
def refused_class(name: str) -> type[torch.optim.Optimizer] | None:
    """Return a class in the place of a class of torch.optim, which can be named, and not made.

    Scripts name classes in tables and in `isinstance`; only an instance needs a server.

    Returns:
        The class; None for a name that is no optimizer of torch.
    """
    theirs = getattr(torch.optim, name, None)
    if not (isinstance(theirs, type) and issubclass(theirs, torch.optim.Optimizer)):
        return None
    reason = _REASONS.get(name, _NO_RULE)

    def refuse(self: Any, *arguments: Any, **options: Any) -> None:
        raise UnsupportedFeatureError(
            f"stepwire.torch.{name}: {reason}; use torch.optim.{name} for these parameters",
            metadata={"field": "optimizer", "feature": f"torch_{name}"},
        )

    attributes = {"__init__": refuse, "__doc__": f"Not served: {reason}.", "__module__": "stepwire.torch"}
    return type(name, (torch.optim.Optimizer,), attributes)


def refuse_options(groups: list[dict[str, Any]]) -> None:
    """Refuse options of torch that a server cannot serve.

    Raises:
        UnsupportedFeatureError: a group has such an option.
    """
    for index, group in enumerate(groups):
        for name, reason in REFUSED_OPTIONS.items():
            if group.get(name):
                raise UnsupportedFeatureError(
                    f"param_groups[{index}][{name!r}] is True, and {reason}; leave it out",
                    metadata={"field": f"param_groups[{index}].{name}", "feature": f"torch_{name}"},
                )
