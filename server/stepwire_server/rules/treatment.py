"""The arithmetic around a rule, element by element.

These stages follow one another in this order, each only where it is asked for:

    g ← g·f                   f = ±1 / loss scale: unscaling, and the sign of maximize
    g ← a + g                 a: the sum of the micro-steps before
    g ← g·c                   c: the coefficient of norm clipping
    g ← min(max(g, −x), x)    x: the bound of clipping by value
    weight decay, the rule, weight decay: see `Decay`
    e ← e + (1 − d)·(p − e)   d: decay of the parameters' moving average e

NaN passes through all of them.

Decoupled decay has three forms, and small decays tell them apart. s = lr·λ is what an update takes of a parameter.

    p·(1 − s)          1 − s is a multiple of 2⁻²⁴: below 2⁻²⁵ there is no decay, and s = 1e-5 acts like 1.001e-5
    p − s·p            s·p is exact to 24 bits, and the difference is rounded to those of p: below 2⁻²⁵ no decay either
    p + (−s·p − d)     decay and update are added before the one rounding to the bits of p: it acts on where updates
                       end, however small s is; where d is 0 it is as the second
"""

from __future__ import annotations

from numpy import maximum, minimum

from stepwire_server.rules.rule import Value

__all__ = ["added", "averaged", "decayed", "drawn", "lessened", "limited", "moved", "scaled"]


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


def lessened(p: Value, lost: Value) -> Value:
    """Subtract a fraction of the parameter, as Keras does; lost = lr·λ."""
    return p - p * lost


def drawn(p: Value, lost: Value) -> Value:
    """Return the displacement by decay alone, from which the rule goes on; lost = lr·λ."""
    return -(lost * p)


def moved(p: Value, way: Value) -> Value:
    """Add a displacement, as optax does."""
    return p + way


def averaged(e: Value, p: Value, rate: Value) -> Value:
    """Move the average towards the parameter; rate = 1 − d."""
    return e + rate * (p - e)
