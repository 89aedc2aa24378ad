"""The functions a rule is made of, as generators of kernels need them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from stepwire_server.rules import Rule

__all__ = ["RuleArguments", "arguments_of", "functions_of", "kernel_name"]


class RuleArguments(NamedTuple):
    """The parameter names of `rule.update`, by role.

    Attributes:
        parameter: the master parameter.
        gradient: the gradient.
        slots: one name for each of `rule.slots`.
        scalars: one name for each of the rule's scalars.
    """

    parameter: str
    gradient: str
    slots: tuple[str, ...]
    scalars: tuple[str, ...]


def arguments_of(rule: Rule) -> RuleArguments:
    """Name the arguments of `rule.update` by what they carry."""
    parameter, gradient, *rest = inspect.signature(rule.update).parameters
    count = len(rule.slots)
    return RuleArguments(parameter, gradient, tuple(rest[:count]), tuple(rest[count:]))


def kernel_name(rule: Rule, gradient: str, reply: str | None) -> str:
    """Name the kernel that steps `rule`, given wire dtypes by name; rules with the same `update` share kernels."""
    return f"{rule.update.__name__}_{gradient}_to_{reply or 'nothing'}"


def functions_of(function: Callable[..., Any]) -> list[types.FunctionType]:
    """List the function and the functions of its own module that it calls, each after those it calls."""
    assert isinstance(function, types.FunctionType)
    found: dict[str, types.FunctionType] = {}

    def visit(current: types.FunctionType) -> None:
        for name in current.__code__.co_names:
            callee = current.__globals__.get(name)
            if isinstance(callee, types.FunctionType) and callee.__module__ == current.__module__:
                visit(callee)
        found.setdefault(current.__name__, current)

    visit(function)
    return list(found.values())
