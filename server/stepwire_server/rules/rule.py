"""What a formula is, to an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from stepwire.optimizers import Hyperparameters

__all__ = ["Rule"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One optimizer formula, written once.

    Attributes:
        name: unique among the rules.
        update: `(p, g, *slots, *scalars) → (p, *slots)` for one element, in the subset that Numba compiles,
            NumPy evaluates on arrays and the CUDA printer renders: assignments, + − * /, unary minus,
            `sqrt`, `maximum`, and calls of other such functions of the same module. No literals: every
            constant is a scalar argument, because `1.0 * p` is float64 to Numba and float32 to NumPy.
            Rules may share one `update` and differ in `scalars`; kernels belong to the `update`.
        slots: names of the state arrays besides the parameters, in the order `update` takes them.
        scalars: `(hyperparameters, t) → tuple` of the per-step scalars in the order `update` takes them,
            in float64; t counts this update, the first is 1.
    """

    name: str
    update: Callable[..., tuple[Any, ...]]
    slots: tuple[str, ...]
    scalars: Callable[[Hyperparameters, int], tuple[float, ...]]
