"""The arithmetic around a rule, element by element.

These stages follow one another in this order, each only where it is asked for:

    g ← g·f                   f = ±1 / loss scale: unscaling, and the sign of maximize
    g ← a + g                 a: the sum of the micro-steps before
    g ← g·c                   c: the coefficient of norm clipping
    g ← min(max(g, −x), x)    x: the bound of clipping by value
    weight decay, the rule, weight decay: see `Decay`
    e ← e + (1 − d)·(p − e)   d: decay of the parameters' moving average e

NaN passes through all of them.
"""

from __future__ import annotations

from numpy import maximum, minimum

from stepwire_server.rules.rule import Value

__all__ = ["added", "averaged", "decayed", "limited", "scaled"]


def scaled(x: Value, factor: Value) -> Value:
    """Multiply; a factor of exactly 1 changes nothing."""
    return x * factor


def added(g: Value, accumulated: Value) -> Value:
    """Add the micro-steps before."""
    return accumulated + g


def limited(g: Value, limit: Value) -> Value:
    """Bound the magnitude."""
    return minimum(maximum(g, -limit), limit)


def decayed(g: Value, p: Value, decay: Value) -> Value:
    """Add the decay's gradient."""
    return g + decay * p


def averaged(e: Value, p: Value, rate: Value) -> Value:
    """Move the average towards the parameter; rate = 1 − d."""
    return e + rate * (p - e)
