"""Clipping by norm, in the form of each framework. c is the bound, n the norm.

    torch   min(1, c / (n + 1e-6))       clip_grad_norm_
    optax   1 where n < c, else c / n    clip_by_global_norm
    keras   c·min(1 / n, 1 / c)          global_clipnorm

Sources: the code of torch 2.13, optax 0.2.8 and Keras 3.15. A norm that is NaN gives NaN, as in all three.
"""

from __future__ import annotations

import math

from stepwire.treatment import ClipFormula

__all__ = ["clip_coefficient"]


def clip_coefficient(norm: float, bound: float, formula: ClipFormula) -> float:
    """Return the factor that clips a gradient of norm n to the bound c."""
    if math.isnan(norm):
        return math.nan
    match formula:
        case "torch":
            return min(1.0, bound / (norm + 1e-6))
        case "optax":
            return 1.0 if norm < bound else bound / norm
        case "keras":
            return bound * min(1.0 / norm if norm else math.inf, 1.0 / bound)
