"""The norms of one step's gradient, and the factors of clipping by norm.

A norm decides the factor of clipping, and so every bit of the next parameters. The norm must not change when a tensor
travels in other chunks, lies in another group, or is summed by another number of threads. So a norm is the true norm of
its float32 elements, correctly rounded to float32's 24 bits (for every exponent).

An engine's sum in float64 is within 2⁻⁴⁵ of the truth. Both ends of that interval almost always round to the same
norm. About one norm in a million needs the exact sum, in integers.

Clipping by norm has the form of each framework. c is the bound, n the norm.

    torch   min(1, c / (n + 1e-6))       clip_grad_norm_
    optax   1 where n < c, else c / n    clip_by_global_norm
    keras   c·min(1 / n, 1 / c)          global_clipnorm

Sources: the code of torch 2.13, optax 0.2.8 and Keras 3.15. A norm of NaN gives NaN, as in all three.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from operator import mul
from typing import NamedTuple

from stepwire.optimizers.gradient_treatment import ClipFormula

__all__ = [
    "RELATIVE_ERROR",
    "GradientNorms",
    "candidates",
    "clip_coefficient",
    "clip_keras",
    "clip_optax",
    "clip_torch",
    "gradient_norms",
    "rounded",
    "rounded_norm",
    "with_factors",
]

RELATIVE_ERROR = 2.0**-45
"""The largest relative error of an engine's sum of squares: at most 128 roundings of 2⁻⁵³ each."""


class GradientNorms(NamedTuple):
    """Norms before clipping, and the factors of clipping.

    Attributes:
        groups: the norm of each group's gradient.
        total: the norm of the whole gradient.
        coefficients: the factor of each group, from its own clipping and the global clipping together.
        coefficient: the factor of clipping by the global norm.
        left: the norm of the whole gradient after clipping of groups and before clipping by the global norm.
    """

    groups: tuple[float, ...]
    total: float
    coefficients: tuple[float, ...]
    coefficient: float
    left: float

    def clipped(self) -> tuple[float, ...]:
        """Return the norm of each group's gradient after clipping by norm."""
        return tuple(map(mul, self.groups, self.coefficients))


def gradient_norms(
    squared: Sequence[float],
    exact: Callable[[Sequence[int]], Fraction],
    bound: float | None,
    group_bounds: Sequence[float | None],
    formula: ClipFormula,
) -> GradientNorms:
    """Return the norms and factors of clipping each group by its own norm, then all groups by the global norm.

    Args:
        squared: each group's sum of squares, within `RELATIVE_ERROR`.
        exact: a function that returns the exact sum of squares of some groups.
        bound: the bound of the global norm; None for none.
        group_bounds: the bound of each group's own norm; None for none.
        formula: the formula of clipping.

    Returns:
        The norms and factors. The global norm in clipping is the norm after the groups' own clipping.
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
    norms = with_factors(GradientNorms(groups, total, (), 1.0, total), 1.0, own)
    return norms if bound is None else with_factors(norms, clip_coefficient(norms.left, bound, formula), own)


def clip_coefficient(norm: float, bound: float, formula: ClipFormula) -> float:
    """Return the factor that clips a gradient of norm n to the bound c."""
    if math.isnan(norm):
        return math.nan
    match formula:
        case "torch":
            return clip_torch(norm, bound)
        case "optax":
            return clip_optax(norm, bound)
        case "keras":
            return clip_keras(norm, bound)


# Numbers in the subset that Numba compiles: a compiled lane has these functions as they stand.


def clip_torch(norm: float, bound: float) -> float:
    """Return the factor by torch's formula; see the module."""
    return min(1.0, bound / (norm + 1e-6))


def clip_optax(norm: float, bound: float) -> float:
    """Return the factor by optax's formula; see the module."""
    return 1.0 if norm < bound else bound / norm


def clip_keras(norm: float, bound: float) -> float:
    """Return the factor by Keras's formula; see the module."""
    return bound * min(1.0 / norm if norm else math.inf, 1.0 / bound)


def rounded(value: float) -> float:
    """Round to 24 bits, ties to even."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2.0**24), exponent - 24)


def candidates(total: float) -> tuple[float, float]:
    """Return the least and the largest norm that a sum of squares may have; as a rule they are the same."""
    error = 2.0 * RELATIVE_ERROR
    return rounded(math.sqrt(total * (1.0 - error))), rounded(math.sqrt(total * (1.0 + error)))


def with_factors(norms: GradientNorms, coefficient: float, own: Sequence[float]) -> GradientNorms:
    """Return the norms of one shard's gradient with the factors that come from the whole gradient.

    Args:
        norms: the norms of the shard, unclipped.
        coefficient: the factor of clipping by the global norm.
        own: the factor of each group's own clipping; empty for none.

    Returns:
        The norms of the shard, with the factors.
    """
    own = own or (1.0,) * len(norms.groups)
    left = norms.total
    if any(factor != 1.0 for factor in own):
        left = math.hypot(*(norm * factor for norm, factor in zip(norms.groups, own, strict=True)))
    return GradientNorms(norms.groups, norms.total, tuple(factor * coefficient for factor in own), coefficient, left)


def rounded_norm(total: float, exact: Callable[[], Fraction]) -> float:
    """Return the root of a sum of squares, correctly rounded to 24 bits.

    Args:
        total: the sum, within `RELATIVE_ERROR`; an infinite or NaN sum is returned unchanged.
        exact: a function that returns the exact sum; called only if both neighbours are possible.

    Returns:
        The norm.
    """
    if not math.isfinite(total) or total == 0.0:
        return total
    low, high = candidates(total)
    return low if low == high else _nearer(exact(), low, high)


def _nearer(total: Fraction, low: float, high: float) -> float:
    """Return the one of two neighbours that the root of `total` rounds to."""
    middle = (Fraction(low) + Fraction(high)) / 2
    if total != middle * middle:
        return low if total < middle * middle else high
    mantissa, _ = math.frexp(low)
    return low if int(mantissa * 2.0**24) % 2 == 0 else high
