"""The functions a recipe is made of, as generators of kernels need them."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

from stepwire_server.rules import Stage

__all__ = ["functions_of", "functions_of_stages"]

_ORIGINS = ("stepwire_server.rules", "stepwire_server.engines")


def functions_of(function: Callable[..., Any]) -> list[types.FunctionType]:
    """List the function and those of our own that it calls, each after those it calls."""
    assert isinstance(function, types.FunctionType)
    found: dict[str, types.FunctionType] = {}

    def visit(current: types.FunctionType) -> None:
        for name in current.__code__.co_names:
            callee = current.__globals__.get(name)
            if isinstance(callee, types.FunctionType) and callee.__module__.startswith(_ORIGINS):
                visit(callee)
        found.setdefault(current.__name__, current)

    visit(function)
    return list(found.values())


def functions_of_stages(stages: Iterable[Stage]) -> list[types.FunctionType]:
    """List all functions of some stages, each once and after those it calls."""
    found: dict[str, types.FunctionType] = {}
    for stage in stages:
        found |= {function.__name__: function for function in functions_of(stage.function)}
    return list(found.values())
