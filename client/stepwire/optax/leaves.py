"""The leaves of JAX's trees, with the names that the server knows them by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepwire.arrays.trees import SEPARATOR
from stepwire.errors import InvalidRequestError
from stepwire.wire.dtypes import FLOAT32, is_wire_dtype

__all__ = ["Leaves", "bools_by_name", "is_traced", "leaves_of"]

_ALONE: Final = "params"  # parameters that are one array have no path


class Leaves(NamedTuple):
    """A tree taken apart.

    Attributes:
        names: paths, as `stepwire.arrays.trees` has them: "encoder/0/w".
        arrays: the leaves in the same order.
        structure: JAX's.
    """

    names: list[str]
    arrays: list[Any]
    structure: Any

    @property
    def wire_dtype(self) -> np.dtype[Any]:
        """How such leaves travel without loss: as they are where all are of one half precision, else in float32."""
        dtypes = {np.dtype(array.dtype) for array in self.arrays}
        return dtypes.pop() if len(dtypes) == 1 else FLOAT32


def leaves_of(tree: Any, field: str) -> Leaves:
    """Take a tree apart.

    Raises:
        InvalidRequestError: there is no leaf, two have one name, or a dtype is none that parameters can have.
    """
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
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
    """Return a mask of optax's, a tree of bools, a prefix of one, or a function of the parameters, by names.

    Raises:
        InvalidRequestError: it does not fit the parameters, or its leaves are no bools.
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
    """Tell whether JAX is tracing what is being done to these values.

    That no value is a tracer is not enough: inside `jit` a program may use constants alone, and what is done to them
    there is to be done each time it runs. New arrays are traced wherever something is.
    """
    return any(isinstance(value, jax.core.Tracer) for value in (*values, jnp.zeros((), jnp.int32)))


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
