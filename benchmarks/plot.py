"""The plot of docs/performance.md: the time of one large step, over every transport and beside floors and peers."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import variants

__all__ = ["bars", "draw"]

_TIME = " ms"
_LONGEST = 1.5  # times the longest of ours
_OURS = {variant.name for variant in variants.VARIANTS}
_FLOORS = ("raw ", "three ", "engine ", "one copy ")
_COLOURS = {"stepwire": "#2b6cb0", "floor": "#a0aec0", "peer": "#dd6b20"}
_TITLES = {"transports": "beside its floors", "peers": "beside peers"}


def bars(figures: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Return name, milliseconds and kind of every contender of a section, the fastest first."""
    times = {name.removesuffix(_TIME): value for name, value in figures.items() if name.endswith(_TIME)}
    return sorted(((name, value, _kind(name)) for name, value in times.items()), key=lambda bar: bar[1])


def draw(results: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draw the largest contests of a run, a panel each; nothing where there are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    panels = {kind: name for name in results for kind in _TITLES if name.startswith(f"{kind} ")}  # the last is largest
    if not panels:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.5 * len(panels), 7), layout="constrained", squeeze=False)
    for axis, (kind, name) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, bars(results[name]))
        axis.set_title(f"{name.removeprefix(f'{kind} ')} parameters, {_TITLES[kind]}")
    figure.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in _COLOURS.items()],
        loc="outside lower center",
        ncols=3,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _panel(axis: Any, shown: Sequence[tuple[str, float, str]]) -> None:
    """Draw bars; one that would dwarf the others is cut short, and its label says so."""
    limit = _LONGEST * max((value for _, value, kind in shown if kind == "stepwire"), default=math.inf)
    names, lengths = [name for name, *_ in shown], [min(value, limit) for _, value, _ in shown]
    drawn = axis.barh(names, lengths, color=[_COLOURS[kind] for *_, kind in shown])
    labels = [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for _, value, _ in shown]
    cut = [value > limit for _, value, _ in shown]
    axis.bar_label(
        drawn,
        [f"{label} (cut short)" if short else label for label, short in zip(labels, cut, strict=True)],
        padding=3,
        fontsize=8,
    )
    axis.invert_yaxis()
    axis.margins(x=0.35 if any(cut) else 0.1)
    axis.set_xlabel("milliseconds, median")


def _kind(name: str) -> str:
    if name in _OURS:
        return "stepwire"
    return "floor" if name.startswith(_FLOORS) else "peer"
