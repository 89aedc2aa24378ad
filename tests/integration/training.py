"""Models to train, and what it takes to call two trainings the same: every bit of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

import stepwire
from stepwire.results import Snapshot, StepResult

__all__ = [
    "OVERLAPPED",
    "PATCHED",
    "SMALL",
    "TINY",
    "WIDE",
    "Model",
    "assert_same_result",
    "bits",
    "same_bits",
    "telemetry",
]

Arrays = dict[str, npt.NDArray[np.float32]]

_SEED = 20_261_122


class Model(NamedTuple):
    """The parameters that a session is created from, its gradient at each step, and the options of its steps."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    options: Callable[[], dict[str, Any]]
    steps: dict[str, Any] = {}

    def parameters(self) -> Arrays:
        """Return the start."""
        return self.gradient(0)

    def gradient(self, step: int) -> Arrays:
        """Return the gradient of a step: random, and the same whenever it is asked for."""
        generator = np.random.default_rng((_SEED, step))
        return {name: generator.standard_normal(shape, np.float32) for name, shape in self.shapes.items()}

    def create(self, client: stepwire.Client, **options: Any) -> stepwire.Session:
        """Create a session of this model."""
        return client.create_session(self.parameters(), **(self.options() | options))


TINY = Model("tiny", {"w": (3, 4)}, lambda: {"optimizer": stepwire.Adam(lr=1e-2)})

# One frame each way.
SMALL = Model(
    "small",
    {"w": (17, 9), "b": (9,), "scale": ()},
    lambda: {"optimizer": stepwire.Adam(lr=1e-2, weight_decay=1e-3)},
)

# Several chunks each way where a chunk has 64 KiB, padding between two groups of different numbers, and answers in
# another encoding than the state: a replay encodes what is there, a step encodes in the pass that updates.
WIDE = Model(
    "wide",
    {"embedding": (300, 210), "w": (190, 180), "b": (181,)},
    lambda: {
        "optimizer": stepwire.AdamW(lr=1e-3, amsgrad=True),
        "reply_dtype": "bfloat16",
        "groups": [{"params": ["w", "b"], "lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.0}],
    },
)

# The same, its chunks applied as they arrive, the last tensor first.
OVERLAPPED = Model(
    "overlapped",
    WIDE.shapes,
    lambda: WIDE.options() | {"non_finite": "allow"},
    {"overlap": True, "reply_first": ["b", "w"]},
)

# The same, of whose answers only what changed travels.
PATCHED = Model("patched", WIDE.shapes, WIDE.options, {"reply": "changed"})


def bits(arrays: Mapping[str, npt.NDArray[Any]] | list[npt.NDArray[Any]]) -> dict[str, tuple[str, bytes]]:
    """Return arrays as what can be compared bit for bit: NaN equals NaN, and 0 is not -0."""
    named = arrays.items() if isinstance(arrays, Mapping) else enumerate(arrays)
    return {str(name): (array.dtype.name, array.tobytes()) for name, array in named}


def same_bits(one: Snapshot, other: Snapshot) -> bool:
    """Tell whether two states are equal in every bit and count."""
    numbers, others = ((each.step, each.tensor_steps, each.tensor_scalars) for each in (one, other))
    return numbers == others and {slot: bits(arrays) for slot, arrays in one.slots.items()} == {
        slot: bits(arrays) for slot, arrays in other.slots.items()
    }


def telemetry(result: StepResult | None) -> tuple[Any, ...]:
    """Return what a step's result says of the step itself, and not of how long it took or how often it was sent."""
    assert result is not None
    return result.step, result.epoch, result.skipped, result.grad_norm, result.non_finite_count, result.groups


def assert_same_result(one: StepResult | None, other: StepResult | None) -> None:
    """Compare two results exactly, but for the norms of updates and parameters, which are told to six digits.

    A pass with an answer may sum them in another order than one without.
    """
    assert one is not None
    assert other is not None
    names = ("step", "epoch", "skipped", "grad_norm", "non_finite_count", "clip_coefficient")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    for group, expected in zip(one.groups, other.groups, strict=True):
        told = [value or 0.0 for value in (group.update_norm, group.param_norm)]
        assert told == pytest.approx([value or 0.0 for value in (expected.update_norm, expected.param_norm)], rel=1e-5)
        same = {"update_norm": expected.update_norm, "param_norm": expected.param_norm}
        assert dataclasses.replace(group, **same) == expected
