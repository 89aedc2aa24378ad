"""Plots of a training as its client saw it; matplotlib, the extra `plots`, draws them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from stepwire.errors import InvalidRequestError
from stepwire.session import Session
from stepwire.step_result import PastStep

__all__ = ["training"]

Series: TypeAlias = dict[str, list[float]]

_SIZE_INCHES: Final = (10.0, 7.0)
_MISSING: Final = math.nan
_NON_FINITE_COLOR: Final = "tab:red"


def training(steps: Session | Sequence[PastStep]) -> Any:
    """Draw norms, learning rates and times over the steps.

    Red lines mark the steps whose gradients had NaN or Inf.

    Args:
        steps: a session, or steps of its `history`, such as `session.history(100)`.

    Returns:
        A `matplotlib.figure.Figure`, which notebooks show; `savefig(path)` writes it to a file.

    Raises:
        ImportError: matplotlib is not installed.
        InvalidRequestError: there are no steps.
    """
    history = _checked(steps)
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as missing:
        raise ImportError(
            "stepwire.plots needs matplotlib, which is not installed: pip install 'stepwire[plots]'", name="matplotlib"
        ) from missing
    figure = figures.Figure(figsize=_SIZE_INCHES, layout="constrained")
    norms, ratio, rates, times = figure.subplots(2, 2, sharex=True).flat
    _draw(norms, history, _norms(history), "norm of the gradient", log=True)
    _draw(ratio, history, _ratios(history), "norm of the update by that of the parameters", log=True)
    _draw(rates, history, _rates(history), "learning rate", log=False)
    _draw(times, history, _times(history), "seconds of a step", log=True)
    for axes in (rates, times):
        axes.set_xlabel("step")
    return figure


def _checked(steps: Session | Sequence[PastStep]) -> tuple[PastStep, ...]:
    if not isinstance(steps, (Session, Sequence)) or not all(isinstance(each, PastStep) for each in _of(steps)):
        raise InvalidRequestError.of(
            "steps",
            f"{type(steps).__name__} is neither a session nor steps of `history`; of an `AsyncSession` give `await "
            "session.history()`, and of an optimizer its `session`",
        )
    if not (history := tuple(_of(steps))):
        raise InvalidRequestError.of("steps", "there are none to draw; step the session first")
    return history


def _of(steps: Session | Sequence[PastStep]) -> Sequence[PastStep]:
    return steps.history() if isinstance(steps, Session) else steps


def _norms(history: Sequence[PastStep]) -> Series:
    results = [past.result for past in history]
    series = {"before clipping": [result.grad_norm for result in results]}
    clipped = [_MISSING if result.skipped else result.clipped_grad_norm for result in results]
    if any(norm < result.grad_norm for norm, result in zip(clipped, results, strict=True)):
        series["after clipping"] = clipped
    return series


def _ratios(history: Sequence[PastStep]) -> Series:
    return {"all": [_ratio(past.result) for past in history], **_of_groups(history, _ratio)}


def _ratio(measured: Any) -> float:
    """Return the ratio of a result, or of a group's; NaN, a gap in the line, without a measurement."""
    if measured.update_norm is None or not measured.param_norm:
        return _MISSING
    return float(measured.update_norm / measured.param_norm)


def _rates(history: Sequence[PastStep]) -> Series:
    of_groups = _of_groups(history, lambda group: group.hyperparameters.lr)
    return of_groups or {"all": [past.learning_rates[0] if past.learning_rates else _MISSING for past in history]}


def _of_groups(history: Sequence[PastStep], value: Any) -> Series:
    """Return a line for each of several groups."""
    count = max(len(past.result.groups) for past in history)
    if count < 2:
        return {}
    groups = [[*past.result.groups, *[None] * (count - len(past.result.groups))] for past in history]
    return {
        f"group {index}": [_MISSING if each[index] is None else value(each[index]) for each in groups]
        for index in range(count)
    }


def _times(history: Sequence[PastStep]) -> Series:
    names = {"receiving": "receive_seconds", "waiting": "queue_seconds", "applying": "apply_seconds"}
    of_server = {label: [getattr(past.result, name) for past in history] for label, name in names.items()}
    told = {
        label: seconds for label, seconds in of_server.items() if any(seconds)
    }  # over shared memory nothing arrives
    return {"as the client sees it": [past.seconds for past in history], **told}


def _draw(axes: Any, history: Sequence[PastStep], series: Series, title: str, *, log: bool) -> None:
    numbers = [past.step for past in history]
    for label, values in series.items():
        axes.plot(numbers, values, label=label, linewidth=1.2, marker="." if len(numbers) == 1 else "")
    for past in history:
        if past.result.non_finite_count:
            axes.axvline(past.step, color=_NON_FINITE_COLOR, linewidth=0.8, alpha=0.7)
    if log and any(value > 0 and math.isfinite(value) for values in series.values() for value in values):
        axes.set_yscale("log")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize="small")
