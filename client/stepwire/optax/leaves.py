"""The leaves of JAX's trees, with their names on the server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepwire.arrays.rows import Rows
from stepwire.arrays.trees import SEPARATOR
from stepwire.errors import InvalidRequestError, UnsupportedFeatureError
from stepwire.wire.dtypes import FLOAT32, is_wire_dtype

__all__ = ["Leaves", "bools_by_name", "is_traced", "leaves_of"]

_ALONE: Final = "params"  # parameters that are one array have no path


class Leaves(NamedTuple):
    """A flattened tree.

    Attributes:
        names: the paths, such as "encoder/0/w"; see `stepwire.arrays.trees`.
        arrays: the leaves in the same order.
        structure: JAX's structure of the tree.
    """

    names: list[str]
    arrays: list[Any]
    structure: Any

    @property
    def wire_dtype(self) -> np.dtype[Any]:
        """The wire dtype without a loss: the dtype of the leaves if all have the same, else float32."""
        dtypes = {np.dtype(array.dtype) for array in self.arrays}
        return dtypes.pop() if len(dtypes) == 1 else FLOAT32


def leaves_of(tree: Any, field: str) -> Leaves:
    """Flatten a tree.

    Args:
        tree: the tree of arrays.
        field: the path that an error names.

    Returns:
        The leaves, with their names.

    Raises:
        InvalidRequestError: there is no leaf, two leaves have one name, or parameters cannot have the dtype of a leaf.
        UnsupportedFeatureError: a leaf is some rows of a table, or a sparse array.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_has_rows)
    for path, leaf in found:
        if _has_rows(leaf):
            raise _no_rows(f"{field}[{SEPARATOR.join(map(_key, path)) or _ALONE!r}]", type(leaf).__name__)
    names = [SEPARATOR.join(map(_key, path)) or _ALONE for path, _ in found]
    arrays = [leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf) for _, leaf in found]
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise InvalidRequestError.of(
            field, f"two leaves have the name {twice[0]!r}: keys are joined by {SEPARATOR!r}; rename one"
        )
    if not arrays:
        raise InvalidRequestError.of(field, "the tree has no arrays")
    for name, array in zip(names, arrays, strict=True):
        if not is_wire_dtype(np.dtype(array.dtype)):
            raise InvalidRequestError.of(
                f"{field}[{name!r}]",
                f"dtype {array.dtype} is not served; cast it to float32, bfloat16 or float16, or leave the leaf to "
                "another transformation with optax.masked or optax.partition",
            )
    return Leaves(names, arrays, structure)


def bools_by_name(mask: Any, params: Any, field: str) -> dict[str, bool]:
    """Return the bools of optax's mask by the names of the parameters.

    Args:
        mask: a tree of bools, a prefix of such a tree, or a function of the parameters.
        params: the parameters.
        field: the path that an error names.

    Returns:
        The bool of each parameter, by name.

    Raises:
        InvalidRequestError: the mask does not fit the parameters, or its leaves are no bools.
    """
    chosen = mask(params) if callable(mask) else mask
    try:
        spread = jax.tree.map(lambda value, below: jax.tree.map(lambda _: value, below), chosen, params)
    except ValueError as error:
        raise InvalidRequestError.of(field, f"the mask does not fit the parameters: {error}") from None
    found, _ = jax.tree_util.tree_flatten_with_path(spread)
    bools = {SEPARATOR.join(map(_key, path)) or _ALONE: value for path, value in found}
    for name, value in bools.items():
        if not isinstance(value, (bool, np.bool_)):
            raise InvalidRequestError.of(f"{field}[{name!r}]", f"{value!r:.80} is not a bool")
    return {name: bool(value) for name, value in bools.items()}


def is_traced(values: Sequence[Any]) -> bool:
    """Tell whether JAX traces operations on these values.

    A tracer among the values is not necessary: inside `jit` a program may use constants alone, and its operations have
    to happen at each run. A new array is a tracer in every trace.
    """
    return any(isinstance(value, jax.core.Tracer) for value in (*values, jnp.zeros((), jnp.int32)))


def _has_rows(node: Any) -> bool:
    """Tell whether a node of a tree is rows, or a sparse array of JAX's, whose own leaves would hide it."""
    return isinstance(node, Rows) or any(kind.__name__ == "JAXSparse" for kind in type(node).__mro__)


def _no_rows(field: str, kind: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"{field}: {kind}; a transformation steps whole arrays. Leave the table out of the parameters, differentiate "
        "with respect to the rows of the batch, and give these to a session: session.step({name: stepwire.Rows(ids, "
        "gradients)}); see docs/jax.md",
        metadata={"field": field, "feature": "optax_rows"},
    )


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
