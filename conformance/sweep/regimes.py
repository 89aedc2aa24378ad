"""The inputs of a sweep: parameters and gradients in regimes that no stored vector has, seeded and the same everywhere.

A regime is some elements that live through the same kind of run. One session has all regimes of a bank side by side, a
tensor each, so that one run of a rule goes through all of them. Rules without norms see elements, not tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from conformance.inputs import Tensors

__all__ = ["BANKS", "EXTREME", "SUBNORMAL", "make_inputs"]

Floats = np.ndarray
Shape = tuple[int, int]
Draw = Callable[[np.random.Generator, Shape], tuple[Floats, Floats]]
"""Makes parameters `(n,)` and gradients `(steps, n)`, float64 to be rounded; the shape is that of the gradients."""

_MAGNITUDES: Final = (1.5e-45, 1e-42, 1e-38, 1e-33, 1e-27, 1e-22, 1e-18, 1e-12, 1e-6, 1e4, 1e10, 1e18, 1e22, 1e30, 3e38)


def _signs(random: np.random.Generator, shape: Shape) -> Floats:
    return np.where(random.random(shape) < 0.5, -1.0, 1.0)


def _start(random: np.random.Generator, count: int, scale: float = 1.0) -> Floats:
    """Draw parameters of which every fourth is zero: there an update is seen without a rounding of its own."""
    values = random.standard_normal(count) * scale
    values[::4] = 0.0
    return values


def _normal(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    return _start(random, shape[1]), random.standard_normal(shape)


def _of_magnitude(magnitude: float) -> Draw:
    def draw(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
        return _start(random, shape[1]), _signs(random, shape) * random.uniform(0.5, 1.0, shape) * magnitude

    return draw


def _outliers(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    return _start(random, shape[1]), random.standard_normal(shape) * np.where(random.random(shape) < 0.02, 1e3, 1e-3)


def _neighbours(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    """Draw one element in 64 that is larger by a thousand, at all steps."""
    return _start(random, shape[1]), random.standard_normal(shape) * np.where(np.arange(shape[1]) % 64 == 3, 1.0, 1e-3)


def _one_outlier(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    gradients = random.standard_normal(shape) * 1e-3
    gradients[min(3, shape[0] - 1)] *= 1e10
    return _start(random, shape[1]), gradients


def _mostly_zero(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    return _start(random, shape[1]), random.standard_normal(shape) * (random.random(shape) < 0.02)


def _nothing(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    return random.standard_normal(shape[1]) * 100.0, np.zeros(shape)


def _burst(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    gradients = random.standard_normal(shape)
    gradients[5:] = 0.0
    return _start(random, shape[1]), gradients


def _steady(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    """Draw gradients of one sign. Equal ones would round the same way at every step, and luck would decide."""
    return _start(random, shape[1]), random.standard_normal(shape[1]) * 0.01 * random.uniform(0.5, 1.5, shape)


def _alternating(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    return _start(random, shape[1]), random.uniform(0.5, 1.0, shape) * ((-1.0) ** np.arange(shape[0]))[:, None]


def _shrinking(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    return _start(random, shape[1]), random.standard_normal(shape) * 0.5 ** np.arange(shape[0])[:, None]


def _growing(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    scales = 2.0 ** np.minimum(np.arange(shape[0]), 120)
    return _start(random, shape[1]), random.standard_normal(shape) * scales[:, None]


def _large_parameters(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
    """Draw parameters beside which a small decay is below the last bit, and an update is not."""
    return random.standard_normal(shape[1]) * 100.0, random.standard_normal(shape)


def _parameters_of(magnitude: float) -> Draw:
    def draw(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
        return _start(random, shape[1], magnitude), random.standard_normal(shape)

    return draw


def _both_of(magnitude: float) -> Draw:
    def draw(random: np.random.Generator, shape: Shape) -> tuple[Floats, Floats]:
        return _start(random, shape[1], magnitude), random.standard_normal(shape) * magnitude

    return draw


_MODERATE: Final[dict[str, Draw]] = {
    "normal": _normal,
    "outliers": _outliers,
    "one outlier": _one_outlier,
    "mostly zero": _mostly_zero,
    "no gradient": _nothing,
    "a burst, then zero": _burst,
    "steady": _steady,
    "alternating": _alternating,
    "shrinking": _shrinking,
    "large parameters": _large_parameters,
}
_EXTREME: Final[dict[str, Draw]] = {
    **{f"gradients of {magnitude:.2g}": _of_magnitude(magnitude) for magnitude in _MAGNITUDES},
    "growing": _growing,
    **{f"parameters of {magnitude:.0e}": _parameters_of(magnitude) for magnitude in (1e-30, 1e5, 1e30)},
    **{f"both of {magnitude:.0e}": _both_of(magnitude) for magnitude in (1e-42, 1e-30, 1e15, 1e30)},
}
_LONG: Final = ("normal", "outliers", "mostly zero", "no gradient", "steady", "alternating", "large parameters")
_NORMS: Final = ("normal", "mostly zero", "no gradient", "shrinking", "large parameters")
_EXTREME_NORMS: Final = (1.5e-45, 1e-42, 1e-38, 1e-22, 1e10, 1e30, 3e38)
_BLOCKS: Final[dict[str, Draw]] = {
    "normal": _normal,
    "outliers": _outliers,
    "large neighbours": _neighbours,
    "one outlier": _one_outlier,
    "mostly zero": _mostly_zero,
    "a burst, then zero": _burst,
    "shrinking": _shrinking,
    "gradients of 1e-22": _of_magnitude(1e-22),
    "gradients of 1e+10": _of_magnitude(1e10),
}

EXTREME: Final = frozenset(_EXTREME)
"""Names of regimes at the edges of float32."""

SUBNORMAL: Final = frozenset({*(f"gradients of {magnitude:.2g}" for magnitude in _MAGNITUDES[:3]), "both of 1e-42"})
"""Names of those with numbers below the least that float32 holds with all its bits."""

BANKS: Final[Mapping[str, tuple[Mapping[str, Draw], int]]] = {
    "all": ({**_MODERATE, **_EXTREME}, 64),
    "moderate": (_MODERATE, 64),
    "long": ({name: _MODERATE[name] for name in _LONG}, 64),
    "norms": (
        {name: _MODERATE[name] for name in _NORMS}
        | {f"gradients of {magnitude:.2g}": _of_magnitude(magnitude) for magnitude in _EXTREME_NORMS}
        | {"both of 1e-30": _both_of(1e-30), "both of 1e+30": _both_of(1e30)},
        64,
    ),
    "blocks": (_BLOCKS, 4096),
}
"""Regimes by name and the elements of each. "norms" are few, since a rule with norms has a tensor of each, and "blocks"
are large enough to be held in 8 bits."""


def make_inputs(bank: str, steps: int, seed: int) -> tuple[Tensors, Tensors]:
    """Return initial parameters, and gradients with the steps along the first axis, by regime; float32."""
    regimes, count = BANKS[bank]
    initial, gradients = {}, {}
    with np.errstate(over="ignore"):
        for name, draw in regimes.items():
            random = np.random.default_rng([seed, zlib.crc32(name.encode())])
            start, values = draw(random, (steps, count))
            initial[name] = np.clip(start, -3e38, 3e38).astype(np.float32)
            gradients[name] = np.clip(values, -3.4e38, 3.4e38).astype(np.float32)
    return initial, gradients
