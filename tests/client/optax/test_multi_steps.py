"""Accumulation by `MultiSteps`, beside optax's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import stepwire  # noqa: E402
import stepwire.optax  # noqa: E402

CASES: dict[str, Any] = {
    "every third": {"every_k_schedule": 3},
    "each": {"every_k_schedule": 1},
    "sums": {"every_k_schedule": 2, "use_grad_mean": False},
    "a schedule": {"every_k_schedule": lambda step: jnp.where(step < 2, 1, 3)},
    "without gradients that are not finite": {
        "every_k_schedule": 2,
        "should_skip_update_fn": optax.skip_not_finite,
    },
}


def gradients(name: str) -> Any:
    drawn = np.random.default_rng(2).standard_normal((9, 4)).astype(np.float32)
    if "finite" in name:
        drawn[4, 2] = np.nan
    return jnp.asarray(drawn)


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_optax(client: stepwire.Client, name: str) -> None:
    def outcome(multi: Any) -> Any:
        params = {"w": jnp.ones(4)}
        state = multi.init(params)
        update = jax.jit(multi.update)
        seen = []
        for gradient in gradients(name):
            updates, state = update({"w": gradient}, state, params)
            params = optax.apply_updates(params, updates)
            seen.append((params["w"], bool(multi.has_updated(state))))
        return seen, state

    inner = stepwire.optax.adam(0.05, server=client)
    got, state = outcome(stepwire.optax.MultiSteps(optax.chain(optax.clip(1.0), inner), **CASES[name]))
    want, other = outcome(optax.MultiSteps(optax.chain(optax.clip(1.0), optax.adam(0.05)), **CASES[name]))
    for (one, updated), (peer, peer_updated) in zip(got, want, strict=True):
        np.testing.assert_allclose(one, peer, atol=2e-6)
        assert updated == peer_updated
    steps = int(other.gradient_step)
    assert inner.session(state.inner_opt_state[1]).applied_step == int(state.gradient_step) == steps


def test_it_is_a_transformation_for_a_chain(client: stepwire.Client) -> None:
    inner = stepwire.optax.sgd(1.0, server=client)
    tx = optax.chain(optax.scale(2.0), stepwire.optax.MultiSteps(inner, 2).gradient_transformation())
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)
    for _ in range(2):  # without `jit`
        updates, state = tx.update({"w": jnp.ones(2)}, state, params)
        params = optax.apply_updates(params, updates)
    assert params["w"].tolist() == [-2.0, -2.0]
