"""Calls of an object's method by others that do not keep the object alive."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from stepwire.errors import InvalidRequestError

__all__ = ["weak_call"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def weak_call(method: Callable[_P, _T], owner: str) -> Callable[_P, _T]:
    """Return a function that calls a bound method as long as its object lives.

    So an object and its parts are no cycle, and end with their last user instead of with the garbage collector.

    Args:
        method: the bound method; a plain function is returned as it is.
        owner: the object in words, for the error of a later call.
    """
    if not inspect.ismethod(method):
        return method
    weak = weakref.WeakMethod(method)

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if (bound := weak()) is None:
            raise InvalidRequestError.of(
                owner, f"the {owner} is gone; keep a reference to it for as long as it is used"
            )
        result: _T = bound(*args, **kwargs)
        return result

    return call
