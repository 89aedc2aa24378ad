"""The tables of the pages, in Markdown: each is made of a run's figures, and empty where it has none."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import goals
import main
import peers
from goals import Goal

__all__ = ["DURABILITY_TABLES", "TABLES", "Results", "grid"]

Results = Mapping[str, Mapping[str, Any]]
_ABSENT = "–"
_LEFT_OUT = " left out"
_TIME = " ms"
_PAGE_WIDTH = 120


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _goals(aims: Sequence[Goal]) -> Callable[[Results], str]:
    def table(results: Results) -> str:
        statuses = [(goal, goals.status(goal, results)) for goal in aims]
        rows = [
            [
                goal.section,
                goal.figure,
                _number(results[goal.section][goal.figure]) if status in ("met", "missed") else _ABSENT,
                f"{'≥' if goal.at_least else '≤'} {goal.bound:g}, {'**missed**' if status == 'missed' else status}",
            ]
            for goal, status in statuses
            if goal.section in results
        ]
        return grid(("section", "figure", "measured", "goal"), rows) if rows else ""

    return table


def _times(kind: str) -> Callable[[Results], str]:
    """Return the table of medians of a contest: a row a contender, a column a size."""
    return lambda results: _contest(results, kind, lambda name: name.endswith(_TIME), "median in ms")


def _ratios(kind: str) -> Callable[[Results], str]:
    return lambda results: _contest(
        results, kind, lambda name: " to " in name and not name.endswith(_LEFT_OUT), "ratio"
    )


def _contest(results: Results, kind: str, wanted: Callable[[str], bool], title: str) -> str:
    columns = {name.removeprefix(f"{kind} "): found for name, found in results.items() if name.startswith(f"{kind} ")}
    names = list(dict.fromkeys(name for found in columns.values() for name in found if wanted(name)))
    rows = [
        [name.removesuffix(_TIME), *(_number(found[name]) if name in found else _ABSENT for found in columns.values())]
        for name in names
    ]
    if not rows:
        return ""
    head = (title, *(f"{size} parameters" for size in columns))
    return "\n\n".join([grid(head, rows), *_absences(columns)] if title != "ratio" else [grid(head, rows)])


def _absences(columns: Results) -> list[str]:
    reasons = {name: value for found in columns.values() for name, value in found.items() if name.endswith(_LEFT_OUT)}
    return [f"{name.removesuffix(_LEFT_OUT)}: not measured: {reason}" for name, reason in reasons.items()]


def _section(name: str) -> Callable[[Results], str]:
    """Return a section as it is: a row a figure."""

    def table(results: Results) -> str:
        rows = [[figure, _number(value)] for figure, value in results.get(name, {}).items()]
        return grid((name, ""), rows) if rows else ""

    return table


def _by_variant(name: str) -> Callable[[Results], str]:
    """Return a section whose figures are called `VARIANT FIGURE`: a row a variant, a column a figure."""

    def table(results: Results) -> str:
        cells: dict[str, dict[str, str]] = {}
        for key, value in results.get(name, {}).items():
            if not isinstance(value, str):
                variant, _, figure = key.rpartition(" ")
                cells.setdefault(variant, {})[figure] = _number(value)
        figures = list(dict.fromkeys(figure for row in cells.values() for figure in row))
        rows = [[variant, *(row.get(figure, _ABSENT) for figure in figures)] for variant, row in cells.items()]
        return grid((name, *(figure.replace("_", " ") for figure in figures)), rows) if rows else ""

    return table


def _lane(results: Results) -> str:
    """Return the ratios of small steps to their floors: a row a step and a floor, a column a size and a pause."""
    pattern = re.compile(r"(.+) (\d+k?, [\d.]+ ms) to (.+)")
    cells: dict[str, dict[str, str]] = {}
    for key, value in results.get("lane", {}).items():
        if (found := pattern.fullmatch(key)) is not None:
            cells.setdefault(f"{found[1]} to {found[3]}", {})[found[2]] = _number(value)
    places = list(dict.fromkeys(place for row in cells.values() for place in row))
    rows = [[name, *(row.get(place, _ABSENT) for place in places)] for name, row in cells.items()]
    return grid(("ratio of medians", *places), rows) if rows else ""


def _kernels(results: Results) -> str:
    """Return the ratios of the engine's pass: a row a ratio, a column a size and number of threads."""
    cells: dict[str, dict[str, str]] = {}
    for key, value in results.get("kernels", {}).items():
        figure, size, threads = key.split()
        if figure in _KERNEL_RATIOS:
            cells.setdefault(figure, {})[f"{size[:-1]} M, {threads[:-1]} t"] = _number(value)
    if not cells:
        return ""
    places = list(next(iter(cells.values())))
    rows = [[_KERNEL_RATIOS[figure], *(row.get(place, _ABSENT) for place in places)] for figure, row in cells.items()]
    return grid(("ratio", *places), rows)


def _levels(results: Results) -> str:
    """Return the time of a step at each level of durability: a row a level, a column a size."""
    pattern = re.compile(r"(memory|checkpoint|journal|bare write) (\d+[kM] \w+) ms")
    cells: dict[str, dict[str, str]] = {}
    for key, value in results.get("durability", {}).items():
        if (found := pattern.fullmatch(key)) is not None:
            cells.setdefault(found[1], {})[found[2]] = _number(value)
    sizes = sorted({size for row in cells.values() for size in row})
    rows = [[level, *(row.get(size, _ABSENT) for size in sizes)] for level, row in cells.items()]
    return grid(("ms", *(size.replace(" ", " parameters, ") for size in sizes)), rows) if rows else ""


def _encodings(results: Results) -> str:
    tasks = {name: found for name, found in results.items() if "float32: mean" in found}
    if not tasks:
        return ""
    names = [key.removesuffix(": mean") for key in next(iter(tasks.values())) if key.endswith(": mean")]
    head = ("final loss", *(f"{title}{task.replace('_', ' ')}" for task in tasks for title in ("", "difference, ")))
    rows = [[name, *(cell for found in tasks.values() for cell in _losses(found, name))] for name in names]
    return grid(head, rows)


def _losses(found: Mapping[str, Any], name: str) -> list[str]:
    spread = [(found.get(f"{name}: {one}"), found.get(f"{name}: {two}")) for one, two in _SPREADS]
    return [_ABSENT if mean is None else f"{mean:.4f} ± {deviation:.4f}" for mean, deviation in spread]


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_SPREADS = (("mean", "deviation"), ("difference", "difference_deviation"))
_KERNEL_RATIOS = {
    "ratio_fused": "float32 step to torch fused, ≤ 1.05",
    "ratio_telemetry": "telemetry to none, ≤ 1.10",
    "ratio_fused_and_casts": "bfloat16 in and out, to torch fused and its two casts, ≤ 0.8",
    "ratio_numpy": "NumPy fallback to torch default, ≤ 0.6",
    "ratio_int8": "8-bit moments to float32 ones, both answered, ≤ 1.2",
    "ratio_bfloat16_moments": "bfloat16 moments to float32 ones, both answered",
    "ratio_copies": "float32 step to a copy of 4 B a parameter",
}


def _machine(results: Results) -> str:
    """Return the lines of the machine, as wide as the page."""
    text = "; ".join(f"{name}: {value}" for name, value in results.get("machine", {}).items())
    return textwrap.fill(text, _PAGE_WIDTH, break_long_words=False, break_on_hyphens=False)


TABLES: Mapping[str, Callable[[Results], str]] = {
    "machine": _machine,
    "goals": _goals(main.GOALS),
    "goals of peers": _goals(peers.GOALS),
    "times": _times("transports"),
    "ratios": _ratios("transports"),
    "peers": _times("peers"),
    "ratios of peers": _ratios("peers"),
    "messages": _section("messages"),
    "shaped link": _section("shaped link"),
    "small step": _section("small_step"),
    "lane": _lane,
    "lane many": _section("lane many"),
    "lane python": _section("lane python"),
    "lane torch": _section("lane torch"),
    "own arrays": _section("own arrays"),
    "standby": _section("standby"),
    "moves": _section("moves"),
    "shards": _section("shards"),
    "large step": _section("large_step"),
    "torch step": _section("torch step"),
    "concurrency": _section("concurrency"),
    "fairness": _section("fairness"),
    "metrics": _section("metrics"),
    "rows": _section("rows"),
    "floods": _section("floods"),
    "many": _section("many"),
    "security": _section("security"),
    "workers": _times("workers"),
    "ratios of workers": _ratios("workers"),
    "straggler": _section("straggler"),
    "memory": _section("memory"),
    "occupancy": _by_variant("occupancy"),
    "growth": _by_variant("growth"),
    "kernels": _kernels,
    "many small": _section("many_small"),
    "encodings": _encodings,
    "durability": _section("durability"),
}
"""The tables of docs/performance.md, by the name of their markers."""

DURABILITY_TABLES: Mapping[str, Callable[[Results], str]] = {"durability levels": _levels}
"""The tables of docs/durability.md."""
