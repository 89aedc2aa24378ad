"""The tensors of a session as its creation describes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from stepwire.arrays.groups import check_choice, precisions_by_name
from stepwire.arrays.trees import expanded
from stepwire.errors import InvalidRequestError, Reason
from stepwire.v1 import tensor_pb2
from stepwire.wire.messages import PRECISIONS, SEMANTICS, table_to_wire
from stepwire.wire.text import checked_text

__all__ = ["tensor_specs"]


def tensor_specs(
    named: Mapping[str, npt.NDArray[Any]],
    membership: Mapping[str, int],
    frozen: Sequence[str],
    precisions: Mapping[str, str],
    tables: Mapping[str, str],
) -> list[tensor_pb2.TensorSpec]:
    """Return the tensors of a session.

    Args:
        named: the parameters by name.
        membership: the group of each.
        frozen: names of tensors, or of branches, that are never stepped.
        precisions: by the name of a tensor or a branch, the precision of its moments.
        tables: by the name of a table, the meaning of a step for its rows.

    Raises:
        InvalidRequestError: a tensor that is frozen, is a table, or has a precision of its own, is not a parameter.
    """
    fixed = list(expanded(frozen, named))
    if unknown := [name for name in fixed if name not in named]:
        raise InvalidRequestError.of("frozen", f"{unknown[0]!r} is not a parameter")
    if unknown := [name for name in tables if name not in named]:
        raise InvalidRequestError.of("tables", f"{unknown[0]!r} is not a parameter")
    for name, semantics in tables.items():
        check_choice(f"tables[{name!r}]", semantics, SEMANTICS)
    own = precisions_by_name(named, precisions)
    return [
        tensor_pb2.TensorSpec(
            name=checked_text(name, "parameters", reason=Reason.INVALID_TENSOR),
            shape=array.shape,
            group=membership[name],
            frozen=name in fixed,
            state_precision=PRECISIONS[own[name]] if name in own else None,
            table=table_to_wire(tables[name]) if name in tables else None,
        )
        for name, array in named.items()
    ]
