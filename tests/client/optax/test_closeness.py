"""The distance from optax, in the bounds that docs/jax.md names."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import stepwire  # noqa: E402
import stepwire.optax  # noqa: E402

STEPS, COUNT = 120, 16
RATES = 3e-4
"""The distance in learning rates: of optax's bias corrections in float32, and of roundings of updates."""


KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "by chance": lambda values, chances: values,
    "of one sign": lambda values, chances: np.abs(values) + 0.1,
    "mostly zero": lambda values, chances: values * (chances < 0.1),
}
SCALES = (0.0, 1.0, 100.0)
SIZES = (1e-30, 1e-20, 1e-9, 1e-3, 1.0, 1e6, 1e18)
CASES = list(itertools.product(KINDS, SCALES, SIZES))


def drawn() -> tuple[Any, Any]:
    """Return parameters (case, element) of all scales, and gradients (step, case, element) of all kinds and sizes."""
    generator = np.random.default_rng(11)
    params, grads = [], []
    for kind, scale, size in CASES:
        params.append(scale * generator.standard_normal(COUNT))
        values, chances = generator.standard_normal((STEPS, COUNT)), generator.random((STEPS, COUNT))
        grads.append(size * KINDS[kind](values, chances))
    return jnp.asarray(np.stack(params), jnp.float32), jnp.asarray(np.stack(grads, axis=1), jnp.float32)


@pytest.mark.parametrize("rate", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(("name", "more"), [("adam", {}), ("adamw", {"weight_decay": 0.01})], ids=["adam", "adamw"])
def test_adam_is_as_close_as_documented(client: stepwire.Client, rate: float, name: str, more: dict[str, Any]) -> None:
    """After each of 120 steps, for the same gradients: a part of the learning rate, and roundings of parameters."""
    params, grads = drawn()

    def trajectory(tx: Any) -> Any:
        def body(carry: Any, gradient: Any) -> Any:
            updates, state = tx.update(gradient, carry[1], carry[0])
            after = optax.apply_updates(carry[0], updates)
            return (after, state), after

        return np.asarray(jax.jit(lambda state: jax.lax.scan(body, (params, state), grads)[1])(tx.init(params)))

    ours = trajectory(getattr(stepwire.optax, name)(rate, **more, server=client))
    theirs = trajectory(getattr(optax, name)(rate, **more))
    steps = np.arange(1, STEPS + 1)[:, None, None]
    largest = np.maximum(np.abs(np.asarray(params)), np.maximum.accumulate(np.abs(theirs)))
    excess = np.abs(np.float64(ours) - np.float64(theirs)) - steps * 2.0**-23 * largest
    worst = excess.max(axis=(0, 2))
    assert worst.max() <= RATES * rate, CASES[int(worst.argmax())]
