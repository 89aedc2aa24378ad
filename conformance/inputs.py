"""The inputs of every case: parameters and a cycle of stored gradients, the same on every machine.

The numbers make a check in units in the last place meaningful. Magnitudes cover five decades, so that a misplaced term
of the denominator shows. Some parameters are zero. After the first step they *are* the update, without a rounding of
their own. Some gradients are exactly zero, and one element's gradients always. In the first two gradients each element
has the sign of its parameter. Then sums of gradient, decay and momentum do not cancel, and the bound for a float32
implementation can be a few ulps. Every later gradient has a random sign.
"""

from __future__ import annotations

from typing import Final

import numpy as np

__all__ = ["CYCLE", "SHAPES", "Tensors", "blocks", "half_gradients", "large", "outliers", "small", "whole"]

Tensors = dict[str, np.ndarray]

CYCLE: Final = 20
"""The number of stored gradients of a tensor: the gradient of step t is number (t - 1) % CYCLE."""

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
    """Return gradients that are exact in bfloat16 and float16: 7 bits after the point, 2^-13 or more."""
    rounded = {}
    for name, gradient in gradients.items():
        mantissa, exponent = np.frexp(gradient)
        value = np.ldexp(np.round(mantissa * 128) / 128, exponent)
        rounded[name] = np.where(np.abs(value) < 2.0**-13, 0.0, value).astype(np.float32)
    return rounded


def large() -> tuple[Tensors, Tensors]:
    """Return parameters of magnitudes in [70, 120], of which decay takes more than rounding does, and the gradients.

    No element is without gradients: alone, a decay of less than half a last place would be lost at every step.
    """
    random = np.random.Generator(np.random.PCG64(70120))
    initial, gradients = small()
    gradients["weight"][:, 2, 3] = random.standard_normal(CYCLE)
    for name, gradient in gradients.items():
        sign = np.where(random.random(gradient.shape[1:]) < 0.5, -1.0, 1.0)
        initial[name] = (random.uniform(70.0, 120.0, sign.shape) * sign).astype(np.float32)
        gradient[:2] = np.abs(gradient[:2]) * sign
    return initial, gradients


def whole() -> tuple[Tensors, Tensors]:
    """Return the parameters of `small` and gradients of whole numbers, so that a factor of 2^-149 leaves them exact."""
    random = np.random.Generator(np.random.PCG64(149))
    initial, gradients = small()
    for name, gradient in gradients.items():
        magnitude = random.integers(1, 1000, gradient.shape)
        gradients[name] = np.where(gradient == 0.0, 0.0, np.sign(gradient) * magnitude).astype(np.float32)
    return initial, gradients


def blocks() -> tuple[Tensors, Tensors]:
    """Return one tensor large enough for 8-bit blocks, and a cycle of 4 gradients of one magnitude."""
    random = np.random.Generator(np.random.PCG64(8))
    initial = {"matrix": random.standard_normal((64, 64)).astype(np.float32)}
    gradient = random.uniform(0.5, 2.0, (4, 64, 64)) * np.where(random.random((64, 64)) < 0.5, -1.0, 1.0)
    return initial, {"matrix": gradient.astype(np.float32)}


def outliers() -> tuple[Tensors, Tensors]:
    """Return the parameters of `blocks`, and a cycle of 4 gradients: one large element in each 256, and others rarely.

    The others have a gradient in the first step of the cycle alone, 5,000 times smaller. Their squares lie below half
    of the smallest value that 8 bits hold beside the large one's. A second moment that is rounded to zero then divides
    a first moment that is not.
    """
    random = np.random.Generator(np.random.PCG64(88))
    initial, _ = blocks()
    gradient = random.uniform(0.5, 2.0, (4, 64, 64)) * np.where(random.random((64, 64)) < 0.5, -1.0, 1.0)
    rare = np.ones(64 * 64, bool)
    rare[::256] = False
    factors = np.where(rare, np.array([2e-4, 0.0, 0.0, 0.0])[:, None], 1.0).reshape(4, 64, 64)
    return initial, {"matrix": (gradient * factors).astype(np.float32)}
