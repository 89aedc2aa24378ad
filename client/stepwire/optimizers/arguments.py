"""The kinds of a user's arguments: a value of another kind is refused by name, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import numpy as np

from stepwire.errors import InvalidRequestError

__all__ = ["check_callable", "check_choice", "checked_flag", "checked_instance", "checked_names"]

_T = TypeVar("_T")


def checked_instance(value: _T, kinds: type[Any] | tuple[type[Any], ...], field: str, remedy: str) -> _T:
    """Return a value of some classes.

    Args:
        value: the value.
        kinds: the class, or the classes.
        field: the path that an error names.
        remedy: what to give in its place, as "give …".

    Raises:
        InvalidRequestError: it is of another class.
    """
    if not isinstance(value, kinds):
        raise InvalidRequestError.of(field, f"{value!r:.80} is of the class {type(value).__name__}; {remedy}")
    return value


def check_callable(value: Callable[..., Any] | None, field: str) -> None:
    """Refuse what is neither a function nor None.

    Raises:
        InvalidRequestError: it is so.
    """
    if value is not None and not callable(value):
        raise InvalidRequestError.of(field, f"{value!r:.80} cannot be called; give a function, or None")


def checked_flag(value: object, field: str) -> bool:
    """Return True or False; NumPy's count.

    Raises:
        InvalidRequestError: it is something else.
    """
    return bool(checked_instance(value, (bool, np.bool_), field, "give True or False"))


def checked_names(value: object, field: str) -> list[str]:
    """Return names in a list.

    Raises:
        InvalidRequestError: they are none, or one alone, whose letters would be names.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidRequestError.of(field, f"{value!r:.80} is no list of names; give one, such as ['w']")
    return [checked_instance(each, str, field, "give names in a list") for each in value]


def check_choice(field: str, choice: object, allowed: Collection[str]) -> None:
    """Refuse a value that is none of those allowed.

    Raises:
        InvalidRequestError: names them.
    """
    if not isinstance(choice, str) or choice not in allowed:
        raise InvalidRequestError.of(field, f"{choice!r:.80}; use one of: {', '.join(allowed)}")
