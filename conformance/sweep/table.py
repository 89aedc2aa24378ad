"""The worst cases of a sweep, as Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from conformance.sweep.judge import Finding

__all__ = ["table"]


def table(findings: Sequence[tuple[str, Finding]]) -> str:
    """Return two tables: the worst finding of each family in float32, and in reduced precision.

    Args:
        findings: of all cases, each with the family of its case.
    """
    precise = [(family, each) for family, each in findings if each.unit == "ulps"]
    reduced = [(family, each) for family, each in findings if each.unit != "ulps"]
    head = ("rule, worst option", "worst regime", "stepwire, ulps", "the framework's float32, ulps")
    other = ("rule, worst option", "worst regime", "stepwire, part of the way", "largest single change, of float64's")
    tables = [_lines(head, [_of_ulps(each) for each in _worst(precise)])] if precise else []
    tables += [_lines(other, [_of_the_way(each) for each in _worst(reduced)])] if reduced else []
    return "\n\n".join("\n".join(lines) for lines in tables)


def _worst(findings: Iterable[tuple[str, Finding]]) -> list[Finding]:
    """Return the worst of each family, in the order of the families."""
    families: dict[str, list[Finding]] = {}
    for family, each in findings:
        families.setdefault(family, []).append(each)
    return [max(members, key=lambda each: (bool(each.fault), each.share)) for members in families.values()]


def _lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in itertools.chain([head, ["---"] * len(head)], rows)]


def _of_ulps(each: Finding) -> tuple[str, ...]:
    return each.case, each.regime, _shown(each.stepwire, each.fault), _shown(each.framework)


def _of_the_way(each: Finding) -> tuple[str, ...]:
    return each.case, each.regime, _shown(each.stepwire, each.fault), f"{each.jump:.2f}"


def _shown(value: float, fault: str = "") -> str:
    text = f"{value:.3f}" if value < 1.0 else f"{value:.1f}" if value < 1e3 else f"{value:.1e}"
    return f"**{text}**: {fault}" if fault else text
