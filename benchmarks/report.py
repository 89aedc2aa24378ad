"""A run on paper: the machine, every figure, the goals; and the file that keeps them."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import goals
import machine
from contest import FAILED
from goals import Goal

__all__ = ["failures", "keep", "text"]


def text(results: Mapping[str, Mapping[str, Any]], aims: Sequence[Goal]) -> str:
    """Return the text of the figures, and of the goals with their figures."""
    printed = [f"{name:>10}  {value}" for name, value in machine.describe().items()]
    for section, figures in results.items():
        width = max(map(len, figures), default=0)
        printed += ["", section]
        printed += [f"  {name:<{width}}  {_number(value)}" for name, value in figures.items()]
    return "\n".join([*printed, "", "goals", *goals.lines(aims, results)])


def keep(results: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
    """Write the figures and the machine as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine.describe(), **results}, indent=2, ensure_ascii=False) + "\n")


def failures(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the figures with a failure in their place."""
    return [
        f"{section}: {name.removesuffix(' left out')}"
        for section, figures in results.items()
        for name, value in figures.items()
        if isinstance(value, str) and value.startswith(FAILED)
    ]


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
