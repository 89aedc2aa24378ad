"""Means of the gradient and of its square, as most formulas have them."""

from __future__ import annotations

from stepwire_server.rules.rule import Value

__all__ = ["first_moment", "second_moment", "weighted_mean"]


def first_moment(m: Value, g: Value, rate1: Value) -> Value:
    """Move the mean gradient towards g; rate1 = 1 − β1. At β1 = 0, `Recipe` passes g for m, and the result is g."""
    return m + rate1 * (g - m)


def weighted_mean(m: Value, g: Value, beta1: Value, rate1: Value) -> Value:
    """Return optax's form of the same, which overflows for no finite gradients; rate1 = 1 − β1."""
    return beta1 * m + rate1 * g


def second_moment(v: Value, g: Value, beta2: Value, rate2: Value) -> Value:
    """Move the mean squared gradient towards g²; rate2 = 1 − β2 comes first, so that g² overflows later."""
    return beta2 * v + rate2 * g * g
