"""The norms of one step's gradient, and what clipping by norm makes of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from stepwire.treatment import ClipFormula
from stepwire_server.clipping import clip_coefficient
from stepwire_server.exact_norm import rounded_norm

__all__ = ["GradientNorms", "gradient_norms"]


class GradientNorms(NamedTuple):
    """Norms before clipping, and the factors of clipping.

    Attributes:
        groups: norm of each group's gradient.
        total: norm of the whole gradient.
        coefficients: the factor of each group, its own clipping and the global one together.
        coefficient: the factor of clipping by the global norm.
        left: norm of the whole gradient after clipping of groups and before clipping by the global norm.
    """

    groups: tuple[float, ...]
    total: float
    coefficients: tuple[float, ...]
    coefficient: float
    left: float

    def clipped(self) -> tuple[float, ...]:
        """Return the norm of each group's gradient after clipping by norm."""
        return tuple(norm * factor for norm, factor in zip(self.groups, self.coefficients, strict=True))


def gradient_norms(
    squared: Sequence[float],
    exact: Callable[[Sequence[int]], Fraction],
    bound: float | None,
    group_bounds: Sequence[float | None],
    formula: ClipFormula,
) -> GradientNorms:
    """Clip each group by its own norm, then all by the global norm of what that leaves.

    Args:
        squared: each group's sum of squares, within `exact_norm.RELATIVE_ERROR`.
        exact: returns the exact sum of squares of some groups.
        bound: of the global norm; None for none.
        group_bounds: of each group's own norm.
        formula: whose form of clipping.
    """
    everything = range(len(squared))
    total = rounded_norm(math.fsum(squared), lambda: exact(everything))
    if len(squared) == 1:
        groups: tuple[float, ...] = (total,)
        if bound is None and group_bounds[0] is None:
            return GradientNorms(groups, total, (1.0,), 1.0, total)
    else:
        groups = tuple(rounded_norm(value, functools.partial(exact, [index])) for index, value in enumerate(squared))
    own = tuple(
        1.0 if limit is None else clip_coefficient(norm, limit, formula)
        for norm, limit in zip(groups, group_bounds, strict=True)
    )
    left = total
    if any(factor != 1.0 for factor in own):
        left = math.hypot(*(norm * factor for norm, factor in zip(groups, own, strict=True)))
    coefficient = 1.0 if bound is None else clip_coefficient(left, bound, formula)
    return GradientNorms(groups, total, tuple(factor * coefficient for factor in own), coefficient, left)
