"""The tensors of a session as its creation describes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stepwire.arrays.groups import precisions_by_name
from stepwire.arrays.packing import named_arrays
from stepwire.arrays.rows import Table
from stepwire.arrays.trees import expanded
from stepwire.errors import InvalidRequestError, Reason
from stepwire.layout import TensorSpec
from stepwire.optimizers.arguments import check_choice, checked_instance, checked_names
from stepwire.optimizers.hyperparameters import number, whole_number
from stepwire.v1 import tensor_pb2
from stepwire.wire.messages import PRECISIONS, SEMANTICS, table_to_wire
from stepwire.wire.text import checked_text

__all__ = ["Described", "described", "tensor_specs"]


class Described(NamedTuple):
    """The tensors of a session before it is created.

    Attributes:
        named: the parameters by name: arrays, or tables that the server makes.
        tables: by the name of a table, the meaning of a step for its rows.
        made: the server makes all tensors, and nothing is loaded.
    """

    named: Mapping[str, Any]
    tables: Mapping[str, str]
    made: bool


def described(leaves: Mapping[str, Any], tables: Mapping[str, str]) -> Described:
    """Check the parameters of a session to create.

    Args:
        leaves: arrays, or `Table`, by name.
        tables: by the names of arrays that are tables, the meaning of a step for their rows.

    Raises:
        InvalidRequestError: an array cannot be sent, or tables that the server makes stand beside arrays.
    """
    checked_instance(tables, Mapping, "tables", "give a dict of names and meanings, such as {'w': 'global'}")
    made = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Table)}
    if not made:
        return Described(named_arrays(leaves, "parameters"), tables, False)
    if others := [name for name in leaves if name not in made]:
        raise InvalidRequestError.of(
            f"parameters[{others[0]!r}]",
            "a session whose server makes tables has nothing else to load; create another session for it, or load the "
            "tables too",
        )
    for name, table in made.items():
        if not isinstance(table.seed, int) or not 0 <= table.seed < 2**64:
            raise InvalidRequestError.of(f"parameters[{name!r}].seed", f"{table.seed!r} is not in [0, 2^64)")
        number(table.uniform_bound, f"parameters[{name!r}].uniform_bound")
        if not 0 <= whole_number(table.max_age_steps, f"parameters[{name!r}].max_age_steps") < 2**63:
            raise InvalidRequestError.of(f"parameters[{name!r}].max_age_steps", f"{table.max_age_steps} is negative")
    return Described(made, {name: table.semantics for name, table in made.items()} | dict(tables), True)


def tensor_specs(
    named: Mapping[str, Any],
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
    fixed = list(expanded(checked_names(frozen, "frozen"), named))
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
            table=_table(array, tables[name]) if name in tables else None,
        )
        for name, array in named.items()
    ]


def _table(tensor: Any, semantics: str) -> tensor_pb2.Table:
    spec = TensorSpec("", (), table=semantics)
    if isinstance(tensor, Table):
        names = ("uniform_bound", "seed", "hashed", "max_age_steps")
        spec = dataclasses.replace(spec, **{name: getattr(tensor, name) for name in names})
    return table_to_wire(spec)
