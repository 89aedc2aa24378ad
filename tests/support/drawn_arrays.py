"""Arrays of small models for tests of sessions, and their comparisons."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

import stepwire

__all__ = ["BFLOAT16", "DTYPES", "OPTIMIZERS", "SHAPES", "Arrays", "assert_close", "bits", "draw", "state_bits"]

BFLOAT16 = ml_dtypes.bfloat16


Arrays = dict[str, npt.NDArray[Any]]
SHAPES: dict[str, tuple[int, ...]] = {"w": (5, 3), "s": (), "e": (0, 4), "b": (7,)}
DTYPES = {"float32": np.float32, "bfloat16": BFLOAT16, "float16": np.float16}
OPTIMIZERS = {
    "adam": stepwire.Adam(lr=0.01),
    "adam with L2 decay": stepwire.Adam(lr=0.01, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6),
    "adamw": stepwire.AdamW(lr=0.02, weight_decay=0.2),
    "amsgrad": stepwire.Adam(lr=0.01, amsgrad=True, betas=(0.5, 0.6)),
    "amsgrad with L2 decay": stepwire.Adam(lr=0.01, amsgrad=True, weight_decay=0.1),
    "maximize": stepwire.Adam(lr=0.01, maximize=True, weight_decay=0.1),
    "no bias correction": stepwire.Adam(lr=0.001, formula="no_bias_correction"),
}


def draw(seed: int, dtype: npt.DTypeLike = np.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Arrays:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def assert_close(got: Any, want: Arrays, rounding: float = 0.0) -> None:
    """Compare with a float64 reference: a few float32 roundings a step, and one more of the answer's encoding."""
    assert list(got) == list(want)
    for name, expected in want.items():
        assert got[name].shape == expected.shape
        error = np.abs(got[name].astype(np.float64) - expected)
        assert (error <= 4e-7 + (2e-6 + rounding) * np.abs(expected)).all(), f"{name}: off by {error.max()}"


def bits(arrays: Any) -> dict[str, bytes]:
    named = arrays.items() if isinstance(arrays, dict) else enumerate(arrays)
    return {str(name): array.tobytes() for name, array in named}


def state_bits(state: stepwire.Snapshot) -> tuple[Any, ...]:
    numbers = (state.step, state.tensor_steps, state.tensor_scalars)
    return *numbers, {slot: bits(arrays) for slot, arrays in state.slots.items()}
