"""The recipes that a compiled lane steps by, and the numbers that it has for each step."""

from __future__ import annotations

from stepwire_server.engines.cpu.lane_words import MOST_ARRAYS
from stepwire_server.engines.cpu.numba_source import arrays_of, seeds_of
from stepwire_server.engines.protocol import Pass
from stepwire_server.engines.stochastic_rounding import seeds_for
from stepwire_server.rules import Precision, Recipe

__all__ = ["lane_numbers", "lane_scalars", "suits"]


def suits(recipe: Recipe) -> bool:
    """Tell whether a lane steps by a recipe: all that its step needs is known before the gradient, but for its norm."""
    plain = not (recipe.accumulates or recipe.limits or recipe.faded) and recipe.precision is not Precision.INT8
    fits = plain and len(arrays_of(recipe)) <= MOST_ARRAYS
    return fits and recipe.rule.direction is None and recipe.rule.tensor_scalar is None


def lane_scalars(recipe: Recipe) -> int:
    """Return the numbers of a step and segment: the scalars of the recipe, then its seeds."""
    return len(recipe.scalars) + len(seeds_of(recipe))


def lane_numbers(step: Pass, recipe: Recipe) -> tuple[float, ...]:
    """Return the numbers of one pass for a lane, by the recipe for how the arrays are held."""
    seeds = len(seeds_of(recipe))
    return (*step.scalars, *(seeds_for(step.seed, seeds) if seeds else ()))
