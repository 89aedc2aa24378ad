"""The results of kernels, computed by NumPy on copies, for the rare cases that need elements and not sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stepwire_server.engines.protocol import PARAM, HostArray, Pass
from stepwire_server.rules import AVERAGE, Recipe
from stepwire_server.rules.treatment import added, scaled

__all__ = ["direction_on_host", "gradient_on_host", "measured_slots"]


def measured_slots(recipe: Recipe) -> tuple[str, ...]:
    """Return the slots that a layerwise rule's direction depends on, besides the parameters, in order."""
    return tuple(slot for slot in recipe.slots if slot != AVERAGE)


def gradient_on_host(values: HostArray, factor: float, accumulated: HostArray | None) -> HostArray:
    """Return the elements that `EngineState.sum_of_squares` squares.

    Args:
        values: the gradient, `(n,) float32`.
        factor: used as float32.
        accumulated: the accumulated gradient that is added, `(n,) float32`; None for none.
    """
    with np.errstate(all="ignore"):
        result = scaled(values, np.float32(factor))
        return np.asarray(result if accumulated is None else added(result, accumulated), np.float32)


def direction_on_host(step: Pass, gradient: HostArray, read: Callable[[str], HostArray]) -> HostArray:
    """Return the direction that `EngineState.measure` squares.

    Args:
        step: as for `measure`.
        gradient: `(n,) float32`.
        read: returns a slot's elements, `(n,) float32`.
    """
    recipe = step.recipe
    names = {PARAM: "p"} | {slot: recipe.slots[slot] for slot in measured_slots(recipe)}
    variables: dict[str, Any] = dict(zip(recipe.scalars, map(np.float32, step.scalars), strict=True))
    variables |= {name: read(slot) for slot, name in names.items()} | {"g": gradient}
    with np.errstate(all="ignore"):
        return np.asarray(recipe.evaluate(recipe.direction_stages, variables)["u"], np.float32)
