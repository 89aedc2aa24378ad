"""Trees of arrays: dicts, lists and tuples in any depth, and the flat names of their arrays in a session.

A tensor's name is its path, keys and positions joined by slashes: the first weight of `{"encoder": [{"w": …}]}` is
`encoder/0/w`. Dots would be ambiguous in a tree of PyTorch's state dicts, and JAX's libraries print paths with slashes.
Keys may contain slashes, as Haiku's keys do. No code splits a name, since a tree is restored by its structure alone. A
tree is refused only if two of its arrays have one name.

Everything but a dict, a list or a tuple is a leaf, and must be an array. So a list of numbers is a list of scalars, as
in JAX. NumPy would make one array of the list.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from stepwire.errors import InvalidRequestError, Reason

__all__ = ["SEPARATOR", "Flattened", "Structure", "Tree", "expanded", "flattened", "is_nested", "structure_like"]

SEPARATOR: Final = "/"

Tree: TypeAlias = dict[str, Any] | list[Any] | tuple[Any, ...]
"""The arrays that users get back, in dicts, lists and tuples like their own."""

_BRANCHES: Final = (Mapping, list, tuple)
_LEAVES: Final = frozenset({np.ndarray})  # as almost always; an abstract class is asked about any other type


class Structure:
    """The nesting of a user's arrays."""

    def __init__(self, skeleton: Any = None) -> None:
        """Keep a tree with names in the place of arrays; None is a flat dict of any names."""
        self._skeleton = skeleton
        self._names = frozenset(_leaves(skeleton))

    def restored(self, named: dict[str, Any], otherwise: Structure | None = None) -> Tree:
        """Return arrays by name in this structure; the empty outermost container for no arrays.

        Args:
            named: the arrays, by name.
            otherwise: the structure to use if the names are not those of this structure.

        Returns:
            The tree.
        """
        if self._skeleton is None:
            return named
        if not named:
            return {} if isinstance(self._skeleton, dict) else [] if isinstance(self._skeleton, list) else ()
        if named.keys() != self._names:
            return named if otherwise is None else otherwise.restored(named)
        restored: Tree = _filled(self._skeleton, named)
        return restored


class Flattened(NamedTuple):
    """A flattened tree: its leaves by name, in order, and its structure."""

    named: dict[str, Any]
    structure: Structure


def is_nested(arrays: object) -> bool:
    """Tell whether a container has others in it. The cost grows with the number of types, not of arrays.

    A tuple counts as nested: it has to come back as a tuple, and flat sequences come back as lists.
    """
    if isinstance(arrays, tuple):
        return True
    if type(arrays) is dict or isinstance(arrays, Mapping):
        values: Iterable[object] = arrays.values()
    else:
        values = arrays if isinstance(arrays, list) else ()
    kinds = set(map(type, values))
    return not kinds <= _LEAVES and any(issubclass(kind, _BRANCHES) for kind in kinds)


def flattened(arrays: object, field: str) -> Flattened:
    """Flatten a tree. The leaves are not checked.

    Args:
        arrays: a dict, a list or another sequence, or a tree of dicts, lists and tuples.
        field: the path that an error names.

    Returns:
        The leaves by name, and the structure.

    Raises:
        InvalidRequestError: not a container, a key that is no string, or two leaves of one name.
    """
    if isinstance(arrays, (str, bytes)) or not isinstance(arrays, (Mapping, Sequence)):
        raise InvalidRequestError.of(
            field, f"{type(arrays).__name__} is neither a dict nor a list of arrays", reason=Reason.INVALID_TENSOR
        )
    named: dict[str, Any] = {}
    if isinstance(arrays, Mapping) and not is_nested(arrays):
        for key in arrays:
            _check_key(key, field)
        return Flattened(dict(arrays), Structure())
    branch = arrays if isinstance(arrays, _BRANCHES) else list(arrays)
    return Flattened(named, Structure(_split_up(branch, "", field, named)))


def structure_like(arrays: object | None) -> Structure:
    """Return the structure of the argument `like`; that of a flat dict for None.

    Raises:
        InvalidRequestError: as `flattened`.
    """
    return Structure() if arrays is None else flattened(arrays, "like").structure


def expanded(names: Iterable[str], tensors: Collection[str], separator: str = SEPARATOR) -> Iterator[str]:
    """Yield names of tensors. The name of a branch stands for all its tensors, and an unknown name for itself."""
    for name in names:
        inside = [] if name in tensors else [each for each in tensors if each.startswith(f"{name}{separator}")]
        yield from inside or (name,)


def _split_up(node: Any, path: str, field: str, named: dict[str, Any]) -> Any:
    """Put the leaves of a node into `named`; return the node with names in place of its leaves."""
    prefix = path + SEPARATOR if path else ""
    if isinstance(node, Mapping):
        for key in node:
            _check_key(key, field)
        return {key: _split_up(child, prefix + key, field, named) for key, child in node.items()}
    if isinstance(node, (list, tuple)):
        children = [_split_up(child, f"{prefix}{position}", field, named) for position, child in enumerate(node)]
        return children if isinstance(node, list) else _tuple_like(node, children)
    if path in named:
        raise InvalidRequestError.of(
            field,
            f"two arrays have the name {path!r}: a key is empty or contains {SEPARATOR!r}; rename the key, or pass a "
            "flat dict of your own names",
            reason=Reason.INVALID_TENSOR,
        )
    named[path] = node
    return path


def _filled(node: Any, named: Mapping[str, Any]) -> Any:
    if isinstance(node, str):
        return named[node]
    if isinstance(node, dict):
        return {key: _filled(child, named) for key, child in node.items()}
    children = [_filled(child, named) for child in node]
    return children if isinstance(node, list) else _tuple_like(node, children)


def _leaves(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif node is not None:
        for child in node.values() if isinstance(node, dict) else node:
            yield from _leaves(child)


def _tuple_like(node: tuple[Any, ...], children: list[Any]) -> tuple[Any, ...]:
    """Return a tuple of the same kind; the constructor of a named tuple has one argument for each field."""
    return type(node)(*children) if hasattr(node, "_fields") else tuple(children)


def _check_key(key: object, field: str) -> None:
    if not isinstance(key, str):
        raise InvalidRequestError.of(field, f"the name {key!r} is not a string", reason=Reason.INVALID_TENSOR)
