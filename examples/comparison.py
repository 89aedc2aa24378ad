"""The loss curves of a local run and of runs on a server: a table, a plot, and checks."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

__all__ = ["Comparison"]

_ROWS = 10


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The results of an example.

    Attributes:
        title: the title of the plot.
        curves: the losses by step of each run; the local run first.
        facts: other results, in the order in which they are printed.
        checks: the conditions by their text; True for a condition that is met.
        marks: the events in the plot, by step.
    """

    title: str
    curves: Mapping[str, Mapping[int, float]]
    facts: Mapping[str, Any]
    checks: Mapping[str, bool]
    marks: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def show(self, options: argparse.Namespace) -> int:
        """Print the comparison, save the plot, and return the exit code: 1 if a check fails."""
        plot = str(self._plot(pathlib.Path(options.plot))) if options.plot else None
        if options.json:
            print(json.dumps(self._summary(plot)))
        else:
            print(self.text(), *([f"plot: {plot}"] if plot else []), sep="\n")
        return 0 if all(self.checks.values()) else 1

    def text(self) -> str:
        """Return the curves with the difference of the first two, the facts and the checks."""
        local, *others = self.curves
        lines = ["".join([f"{'step':>6}", *(f"{name:>18}" for name in self.curves), f"{'difference':>14}"])]
        for step in self._rows():
            losses = [self.curves[name].get(step) for name in self.curves]
            cells = [f"{'—' if loss is None else f'{loss:.6f}':>18}" for loss in losses]
            lines.append("".join([f"{step:>6}", *cells, f"{self._difference(local, others[0], step):>14.1e}"]))
        width = max(map(len, self.facts), default=0)
        lines += ["", *(f"{name:<{width}}  {_told(value)}" for name, value in self.facts.items()), ""]
        lines += [f"{'yes' if holds else 'NO':<4} {check}" for check, holds in self.checks.items()]
        return "\n".join(lines)

    def _rows(self) -> list[int]:
        """Choose about ten steps for the table, the first and the last among them."""
        last = max(next(iter(self.curves.values())))
        return sorted({1, *(round(last * row / _ROWS) or 1 for row in range(1, _ROWS + 1))})

    def _difference(self, one: str, other: str, step: int) -> float:
        return abs(self.curves[one][step] - self.curves[other][step])

    def _summary(self, plot: str | None) -> dict[str, Any]:
        curves = {name: {str(step): losses.get(step) for step in self._rows()} for name, losses in self.curves.items()}
        return {"curves": curves, "facts": dict(self.facts), "checks": dict(self.checks), "plot": plot}

    def _plot(self, path: pathlib.Path) -> pathlib.Path:
        """Draw the curves over each other, each narrower than the one before, and their differences below."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, (losses, differences) = pyplot.subplots(
            2, figsize=(7, 5.2), sharex=True, layout="constrained", height_ratios=(2, 1)
        )
        local = next(iter(self.curves.values()))
        for index, (name, curve) in enumerate(self.curves.items()):
            losses.plot(curve.keys(), curve.values(), color=f"C{index}", label=name, linewidth=4 / 2**index)
            apart = {step: abs(loss - local[step]) for step, loss in curve.items() if index}
            differences.plot(apart.keys(), apart.values(), ".", color=f"C{index}", markersize=9 / 2**index)
        for step, text in self.marks.items():
            losses.annotate(text, (step, local[step]), (step, max(local.values())), arrowprops={"arrowstyle": "->"})
        losses.set(ylabel="cross-entropy", title=self.title)
        losses.legend()
        differences.set(xlabel="step", ylabel=f"apart from {next(iter(self.curves))}", yscale="log")
        for axes in (losses, differences):
            axes.grid(alpha=0.3)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=90)
        pyplot.close(figure)
        return path.resolve()


def _told(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
