"""The classes of torch.optim that a server does not serve: each says the reason when it is made."""

from __future__ import annotations

import functools
from typing import Any, Final

import torch

from stepwire.errors import UnsupportedFeatureError

__all__ = ["refused_class"]

_NO_RULE: Final = "the server has no such rule"
_REASONS: Final = {
    "LBFGS": "it evaluates the model several times in one step",
    "SparseAdam": "sparse rows are not served yet",
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
