"""Loggers: functions of a step and its scalars, given as `logger=` to `Client.create_session` or to `Session.log_to`.

    def logger(step: int, scalars: dict[str, float]) -> None: ...

A logger is called after each step that this client has made, in one of the client's own threads, one call at a time.
The step waits for it. An error of a logger becomes a line of Python's `logging`, and the step is as good as without. A
call of the session from within is refused.

The writers of TensorBoard and of Weights & Biases have conventions of their own; `tensorboard` and `wandb` make loggers
of them. Nothing of theirs is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from stepwire.errors import InvalidRequestError
from stepwire.step_result import PastStep

__all__ = ["Logger", "checked_logger", "scalars_of", "tensorboard", "wandb"]

Logger: TypeAlias = Callable[[int, dict[str, float]], object]
"""A function of the number of a step and of its scalars by name; see `scalars_of`."""

_OF_RESULT = ("grad_norm", "clipped_grad_norm", "clip_coefficient", "non_finite_count", "skipped")
_OF_SOME_RESULTS = ("update_norm", "param_norm", "loss_scale")
_OF_GROUP = ("grad_norm", "update_norm", "param_norm")
_TIMES = ("receive_seconds", "queue_seconds", "apply_seconds")


def checked_logger(logger: Logger | None) -> Logger | None:
    """Return a logger, or None for none.

    Raises:
        InvalidRequestError: it is no function.
    """
    if logger is not None and not callable(logger):
        raise InvalidRequestError.of(
            "logger",
            f"{logger!r:.80} cannot be called with a step and its scalars; `stepwire.loggers` has loggers for the "
            "writers of TensorBoard and Weights & Biases",
        )
    return logger


def scalars_of(past: PastStep) -> dict[str, float]:
    """Return the scalars of a step, by the names of `StepResult`.

    `lr` is the first group's learning rate. With several groups, `group0/lr`, `group0/grad_norm` and so on are those of
    each. `update_ratio` is the norm of the update by that of the parameters. `step_seconds` is the time of the caller.
    Norms that were not measured are missing.
    """
    result = past.result
    values: dict[str, float | None] = {
        name: getattr(result, name) for name in (*_OF_RESULT, *_OF_SOME_RESULTS, *_TIMES)
    }
    values["step_seconds"] = past.seconds
    if result.update_norm is not None and result.param_norm:
        values["update_ratio"] = result.update_norm / result.param_norm
    if result.groups:
        values["lr"] = result.groups[0].hyperparameters.lr
    for index, group in enumerate(result.groups if len(result.groups) > 1 else ()):
        values[f"group{index}/lr"] = group.hyperparameters.lr
        values |= {f"group{index}/{name}": getattr(group, name) for name in _OF_GROUP}
    return {name: float(value) for name, value in values.items() if value is not None}


def tensorboard(writer: Any, *, prefix: str = "optimizer/") -> Logger:
    """Return the logger of a TensorBoard writer, such as `torch.utils.tensorboard.SummaryWriter`.

    Args:
        writer: an object with `add_scalar(tag, value, global_step)`.
        prefix: the beginning of each tag, which groups the charts.

    Raises:
        InvalidRequestError: it is no such writer.
    """
    add_scalar = _method(writer, "add_scalar", "writer", "torch.utils.tensorboard.SummaryWriter(folder)")

    def logger(step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            add_scalar(prefix + name, value, step)

    return logger


def wandb(run: Any, *, prefix: str = "optimizer/", commit: bool | None = None) -> Logger:
    """Return the logger of a run of Weights & Biases.

    The run is given the step among the scalars, as `optimizer/step`, since its own count of steps is the program's.
    `run.define_metric("optimizer/*", step_metric="optimizer/step")` makes it the axis of the charts.

    Args:
        run: an object with `log(data, commit=…)`, such as `wandb.init(…)` returns.
        prefix: the beginning of each name, which groups the charts.
        commit: as for the run's `log`. False has the scalars wait for the program's next `log`.

    Raises:
        InvalidRequestError: it is no such run.
    """
    log = _method(run, "log", "run", "the run that `wandb.init` returns")

    def logger(step: int, scalars: dict[str, float]) -> None:
        log({f"{prefix}step": step} | {prefix + name: value for name, value in scalars.items()}, commit=commit)

    return logger


def _method(owner: Any, name: str, field: str, example: str) -> Callable[..., object]:
    method = getattr(owner, name, None)
    if not callable(method):
        raise InvalidRequestError.of(field, f"{owner!r:.80} has no method `{name}`; give {example}")
    made: Callable[..., object] = method
    return made
