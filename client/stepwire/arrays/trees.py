"""Arrays that nest: dicts, lists and tuples of arrays in any depth, and the flat names that a session knows them by.

A tensor's name is its path, keys and positions joined by slashes: the first weight of `{"encoder": [{"w": …}]}` is
`encoder/0/w`. Slashes rather than dots, because dots are in the names that PyTorch gives, so that a tree of state
dicts has unambiguous paths, and because JAX's libraries print paths so. Keys may have slashes in them, as Haiku's have:
nobody takes a name apart, since a tree is put together again by the structure that it had. Only where two arrays would
have one name is a tree refused.

What is no dict, list or tuple is a leaf, and must be an array. So a list of numbers is a list of scalars here, as in
JAX, where NumPy would make one array of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from stepwire.errors import InvalidRequestError, Reason

__all__ = ["SEPARATOR", "Flattened", "Structure", "Tree", "expanded", "flattened", "is_nested", "structure_like"]

SEPARATOR: Final = "/"

Tree: TypeAlias = dict[str, Any] | list[Any] | tuple[Any, ...]
"""What users get back: arrays in the dicts, lists and tuples in which they passed theirs."""

_BRANCHES: Final = (Mapping, list, tuple)


class Structure:
    """How a user's arrays nest."""

    def __init__(self, skeleton: Any = None) -> None:
        """Keep a tree that has names in the place of arrays; None is a flat dict, whatever its names."""
        self._skeleton = skeleton
        self._names = frozenset(_leaves(skeleton))

    def restored(self, named: dict[str, Any], otherwise: Structure | None = None) -> Tree:
        """Return arrays by name in this structure; no arrays at all as its empty outermost container.

        Args:
            named: the arrays.
            otherwise: the structure to use where this one does not have these names.
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
    """A tree taken apart: its leaves by name, in order, and how they nested."""

    named: dict[str, Any]
    structure: Structure


def is_nested(arrays: object) -> bool:
    """Tell whether a container has others in it. Its cost does not grow with each array, only with each type there is.

    A tuple counts, since it is to come back as one, and lists are what flat sequences come back as.
    """
    if isinstance(arrays, tuple):
        return True
    values = arrays.values() if isinstance(arrays, Mapping) else arrays if isinstance(arrays, list) else ()
    return any(issubclass(kind, _BRANCHES) for kind in set(map(type, values)))


def flattened(arrays: object, field: str) -> Flattened:
    """Take a tree apart; leaves are not looked at.

    Args:
        arrays: a dict, a list or another sequence, or a tree of dicts, lists and tuples.
        field: the path that an error names.

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
    return Flattened(named, Structure(_taken_apart(branch, "", field, named)))


def structure_like(arrays: object | None) -> Structure:
    """Return how the argument `like` nests; without one, as a flat dict.

    Raises:
        InvalidRequestError: as `flattened`.
    """
    return Structure() if arrays is None else flattened(arrays, "like").structure


def expanded(names: Iterable[str], tensors: Collection[str]) -> Iterator[str]:
    """Yield names of tensors; the name of a branch stands for all tensors in it, and an unknown one for itself."""
    for name in names:
        inside = [] if name in tensors else [each for each in tensors if each.startswith(f"{name}{SEPARATOR}")]
        yield from inside or (name,)


def _taken_apart(node: Any, path: str, field: str, named: dict[str, Any]) -> Any:
    """Put the leaves into `named`; return the node with names in their place."""
    prefix = path + SEPARATOR if path else ""
    if isinstance(node, Mapping):
        for key in node:
            _check_key(key, field)
        return {key: _taken_apart(child, prefix + key, field, named) for key, child in node.items()}
    if isinstance(node, (list, tuple)):
        children = [_taken_apart(child, f"{prefix}{position}", field, named) for position, child in enumerate(node)]
        return children if isinstance(node, list) else _tuple_like(node, children)
    if path in named:
        raise InvalidRequestError.of(
            field,
            f"two arrays have the name {path!r}: keys are joined by {SEPARATOR!r}, and here one has that in it, or "
            "is empty; rename it, or pass a flat dict of names of your own",
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
    """Return a tuple of the same kind: named tuples take their fields one by one."""
    return type(node)(*children) if hasattr(node, "_fields") else tuple(children)


def _check_key(key: object, field: str) -> None:
    if not isinstance(key, str):
        raise InvalidRequestError.of(field, f"the name {key!r} is not a string", reason=Reason.INVALID_TENSOR)
