"""The sums of squares that decide a step: of the gradient that came, or of what it has been added to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from stepwire.optimizers import Hyperparameters
from stepwire_server.engines.protocol import EngineState, Pending
from stepwire_server.rules.exact_norm import exact_sum_of_squares
from stepwire_server.steps.gradient import GradientStaging
from stepwire_server.steps.update import gradient_factor

__all__ = ["Squares", "accumulated_squares", "arrived_squares"]


class Squares(NamedTuple):
    """Sums of squares of an unscaled gradient.

    Attributes:
        groups: of each group, within `norms.RELATIVE_ERROR`.
        exact: returns that of some groups exactly; slow and rarely needed.
    """

    groups: list[float]
    exact: Callable[[Sequence[int]], Fraction]


def arrived_squares(staging: GradientStaging) -> Squares:
    """Return those of the gradient that came; they were taken on its way in."""
    return Squares(staging.squared_norms(), staging.exact_squared_norm)


def accumulated_squares(staging: GradientStaging, state: EngineState, groups: Sequence[Hyperparameters]) -> Squares:
    """Return those of the gradient added to those before it: one more pass, which changes nothing."""
    totals: list[list[Pending[float]]] = [[] for _ in groups]
    for start, end, group in staging.active.segments:
        factor = gradient_factor(groups[group], staging.unscale)
        totals[group] += [
            state.sum_of_squares(piece.chunk.gradient, piece.begin, piece.end, factor, piece.start)
            for piece in staging.pieces(start, end)
        ]

    def exact(wanted: Sequence[int]) -> Fraction:
        return exact_sum_of_squares(
            state.fetch(
                piece.chunk.gradient,
                piece.begin,
                piece.end,
                gradient_factor(groups[group], staging.unscale),
                piece.start,
            )
            for start, end, group in staging.active.segments
            if group in wanted
            for piece in staging.pieces(start, end)
        )

    return Squares([math.fsum(asked.wait() for asked in sums) for sums in totals], exact)
