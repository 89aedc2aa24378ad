"""The bounds of a server's error from the float64 numbers, and its errors. The README argues for each bound.

The first `ulp_checkpoints` checkpoints of a case have the numbers n = 1, 2, …. At checkpoint n every element may miss
by

    n · (update_ulps · ulp(d) + parameter_ulps · ulp(q))

Here ulp(x) is the distance from |x| to the next float32. d is the element's largest change between checkpoints so far,
and q is the largest parameter so far. Later, at step s, every element of a tensor may miss by

    relative · sqrt(s / 1000) · max(1, largest parameter of the tensor)

unless the case gives an `absolute` bound. State may miss by `state_relative` of the tensor's largest element.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.message import Message

from conformance.stored_case import StoredCase, Tensors

__all__ = ["Miss", "parameter_misses", "state_misses", "telemetry_misses"]


@dataclasses.dataclass(frozen=True)
class Miss:
    """The error of one tensor or number. `fraction` is the error divided by its bound; above 1 is a failure."""

    label: str
    fraction: float
    ulps: float = 0.0
    relative: float = 0.0
    of_parameters: bool = False


def _ulp(value: np.ndarray) -> np.ndarray:
    spacing: np.ndarray = np.spacing(np.abs(value).astype(np.float32))
    return spacing.astype(np.float64)


def _error(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return |actual - expected|, infinite in place of NaN."""
    with np.errstate(invalid="ignore"):
        error = np.abs(actual.astype(np.float64) - expected)
    return np.where(np.isnan(error), np.inf, error)


def parameter_misses(case: StoredCase, index: int, actual: Tensors) -> Iterator[Miss]:
    """Yield the error of each parameter at a checkpoint."""
    for name, values in case.expected["param"].items():
        label = f"{name} after step {case.checkpoints[index]}"
        error = _error(actual[name], values[index])
        if "absolute" in case.tolerance:
            yield Miss(
                label, _largest(error) / case.tolerance["absolute"], relative=_largest(error), of_parameters=True
            )
        elif index < case.tolerance["ulp_checkpoints"]:
            yield _ulp_miss(case, label, error, np.stack([case.initial[name], *values[: index + 1]]))
        else:
            scale = max(1.0, _largest(values[index]))
            allowed = case.tolerance["relative"] * math.sqrt(case.checkpoints[index] / 1000)
            yield Miss(label, _largest(error) / (allowed * scale), relative=_largest(error) / scale, of_parameters=True)


def _ulp_miss(case: StoredCase, label: str, error: np.ndarray, path: np.ndarray) -> Miss:
    """Return the error in units in the last place; `path` has the exact parameter at the start and each checkpoint."""
    count = len(path) - 1
    update = _ulp(np.abs(np.diff(path, axis=0)).max(axis=0))
    rounding = case.tolerance["parameter_ulps"] * _ulp(np.abs(path).max(axis=0))
    allowed = count * (case.tolerance["update_ulps"] * update + rounding)
    ulps = np.maximum(error - count * rounding, 0.0) / (count * update)
    return Miss(label, _largest(error / allowed), ulps=_largest(ulps), of_parameters=True)


def state_misses(case: StoredCase, index: int, slot: str, actual: Tensors) -> Iterator[Miss]:
    """Yield the error of each tensor of a slot at a checkpoint."""
    for name, values in case.expected[slot].items():
        scale = max(_largest(values[index]), 1e-12)
        relative = _largest(_error(actual[name], values[index])) / scale
        label = f"{slot} of {name} after step {case.checkpoints[index]}"
        yield Miss(label, relative / case.tolerance["state_relative"], relative=relative)


def telemetry_misses(case: StoredCase, number: int, actual: Message) -> Iterator[Miss]:
    """Yield the error of each number in a result's telemetry that the case knows."""
    yield from _message_misses(case, f"telemetry of step {number}: ", case.telemetry(number), actual)


def _message_misses(case: StoredCase, prefix: str, expected: Message, actual: Message) -> Iterator[Miss]:
    for field, value in expected.ListFields():
        found: Any = getattr(actual, field.name)
        label = prefix + field.name
        if field.message_type is None:
            relative = abs(found - value) / max(abs(value), 1e-30)
            yield Miss(f"{label} = {found}, expected {value}", relative / case.tolerance["telemetry_relative"])
        elif isinstance(value, Message):
            yield from _message_misses(case, f"{label}.", value, found)
        elif len(found) != len(value):
            yield Miss(f"{label} has {len(found)} entries, expected {len(value)}", math.inf)
        else:
            for position, (wanted, got) in enumerate(zip(value, found, strict=True)):
                yield from _message_misses(case, f"{label}[{position}].", wanted, got)


def _largest(values: np.ndarray) -> float:
    return float(np.max(np.abs(values), initial=0.0))
