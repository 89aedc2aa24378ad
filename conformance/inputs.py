"""What every case starts from: parameters and a cycle of stored gradients, the same on every machine.

The numbers are chosen so that a check in units in the last place means something. Magnitudes span five decades, so
that a term of the denominator in the wrong place shows. Some parameters are zero, so that after the first step they
*are* the update and nothing of it is hidden by their own rounding. Some gradients are exactly zero, one element's
always. In the first two gradients each element has the sign of its parameter: sums of gradient, decay and momentum
then do not cancel, and a float32 implementation can be held to a few ulps. Every later gradient has a random sign.
"""

from __future__ import annotations

from typing import Final

import numpy as np

__all__ = ["CYCLE", "SHAPES", "Tensors", "blocks", "half_gradients", "small"]

Tensors = dict[str, np.ndarray]

CYCLE: Final = 20
"""Stored gradients a tensor: the gradient of step t is number (t - 1) % CYCLE."""

SHAPES: Final[dict[str, tuple[int, ...]]] = {"weight": (5, 7), "bias": (3,), "scale": ()}


def small() -> tuple[Tensors, Tensors]:
    """Return initial parameters and gradients (first axis: the cycle) of three small tensors, float32."""
    random = np.random.Generator(np.random.PCG64(20261122))
    weight = random.standard_normal((5, 7)) * 10.0 ** random.uniform(-2, 0.5, (5, 7))
    weight[random.random((5, 7)) < 0.2] = 0.0
    initial = {"weight": weight, "bias": np.zeros(3), "scale": np.ones(())}
    gradients = {}
    for name, start in initial.items():
        shape = (CYCLE, *start.shape)
        gradient = random.standard_normal(shape) * 10.0 ** random.uniform(-4, 0.7, shape)
        gradient[random.random(shape) < 0.1] = 0.0
        sign = np.where(start != 0, np.sign(start), np.where(random.random(start.shape) < 0.5, -1.0, 1.0))
        gradient[:2] = np.abs(gradient[:2]) * sign
        gradients[name] = gradient.astype(np.float32)
    gradients["weight"][:, 2, 3] = 0.0
    return {name: value.astype(np.float32) for name, value in initial.items()}, gradients


def half_gradients(gradients: Tensors) -> Tensors:
    """Return gradients that bfloat16 and float16 both hold exactly: 7 bits after the point, 2^-13 or more."""
    rounded = {}
    for name, gradient in gradients.items():
        mantissa, exponent = np.frexp(gradient)
        value = np.ldexp(np.round(mantissa * 128) / 128, exponent)
        rounded[name] = np.where(np.abs(value) < 2.0**-13, 0.0, value).astype(np.float32)
    return rounded


def blocks() -> tuple[Tensors, Tensors]:
    """Return one tensor large enough to be held in 8-bit blocks, and a cycle of 4 gradients of one magnitude."""
    random = np.random.Generator(np.random.PCG64(8))
    initial = {"matrix": random.standard_normal((64, 64)).astype(np.float32)}
    gradient = random.uniform(0.5, 2.0, (4, 64, 64)) * np.where(random.random((64, 64)) < 0.5, -1.0, 1.0)
    return initial, {"matrix": gradient.astype(np.float32)}
