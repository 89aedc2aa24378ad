"""Goals: bounds of figures, and whether a run met them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Goal", "lines", "status"]


class Goal(NamedTuple):
    """A figure and its bound.

    Attributes:
        section: the section of the figure.
        figure: the name of the figure in its section.
        bound: the largest figure that meets the goal.
        at_least: True if the bound is the smallest figure instead.
    """

    section: str
    figure: str
    bound: float
    at_least: bool = False


def status(goal: Goal, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the status of a goal: "met", "missed", or the reason why the figure is not measured."""
    section = results.get(goal.section)
    if section is None:
        return "not measured: no such section in this run"
    value = section.get(goal.figure)
    if value is None:
        return f"not measured: {section.get('skipped', 'who is compared did not take part')}"
    met = value >= goal.bound if goal.at_least else value <= goal.bound
    return "met" if met else "missed"


def lines(goals: Sequence[Goal], results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each goal: figure, bound, status."""
    names = [f"{goal.section}: {goal.figure}" for goal in goals]
    width = max(map(len, names), default=0)
    return [
        f"  {name:<{width}}  {_reached(goal, results)} {'>=' if goal.at_least else '<='} {goal.bound:g}  "
        f"{status(goal, results)}"
        for name, goal in zip(names, goals, strict=True)
    ]


def _reached(goal: Goal, results: Mapping[str, Mapping[str, Any]]) -> str:
    value = results.get(goal.section, {}).get(goal.figure)
    return f"{'–':>9}" if value is None else f"{value:9.3f}"
