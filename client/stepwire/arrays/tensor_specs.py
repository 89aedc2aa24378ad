"""From a user's parameters to the contract's tensors: names, shapes, groups, precisions, the frozen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from stepwire.arrays.groups import precisions_by_name
from stepwire.arrays.trees import expanded
from stepwire.errors import InvalidRequestError, Reason
from stepwire.v1 import tensor_pb2
from stepwire.wire.messages import PRECISIONS
from stepwire.wire.text import checked_text

__all__ = ["tensor_specs"]


def tensor_specs(
    named: Mapping[str, npt.NDArray[Any]],
    membership: Mapping[str, int],
    frozen: Sequence[str],
    precisions: Mapping[str, str],
) -> list[tensor_pb2.TensorSpec]:
    """Return the tensors of a session.

    Args:
        named: the parameters, by name.
        membership: the index of each one's group.
        frozen: the names of frozen tensors, or of branches.
        precisions: the own precisions of tensors, or of branches.

    Raises:
        InvalidRequestError: a tensor that is frozen, or has a precision of its own, is not a parameter.
    """
    fixed = list(expanded(frozen, named))
    if unknown := [name for name in fixed if name not in named]:
        raise InvalidRequestError.of("frozen", f"{unknown[0]!r} is not a parameter")
    own = precisions_by_name(named, precisions)
    return [
        tensor_pb2.TensorSpec(
            name=_name(name),
            shape=array.shape,
            group=membership[name],
            frozen=name in fixed,
            state_precision=PRECISIONS[own[name]] if name in own else None,
        )
        for name, array in named.items()
    ]


def _name(name: str) -> str:
    return checked_text(name, "parameters", reason=Reason.INVALID_TENSOR)
