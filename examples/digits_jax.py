"""Handwritten digits in JAX: `stepwire.optax.adam` beside `optax.adam`, both inside `jax.jit`.

    pip install '.[demo,jax]'
    python examples/digits_jax.py [--target HOST:PORT] [--quick]

Both runs are one function. Only the gradient transformation differs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepwire.optax
from command_line import a_server, command_line, progress_bar
from comparison import Comparison
from stepwire_server.demo import MLP, Digits

SEED = 7
LR = 3e-3


def logits_of(params: Any, x: Any) -> Any:
    """Return the logits of images, `(n, 64)` → `(n, 10)`."""
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_of(params: Any, x: Any, y: Any) -> Any:
    """Return the mean cross-entropy."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y).mean()


def train(
    optimizer: optax.GradientTransformation, digits: Digits, steps: Iterable[int]
) -> tuple[Any, Any, dict[int, float]]:
    """Train from the same parameters at every call; return parameters, optimizer state and the loss at each step."""
    params = jax.tree.map(jnp.asarray, MLP((64, 64, 10), np.random.default_rng(SEED)).parameters)
    state = optimizer.init(params)

    @jax.jit
    def advance(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng, losses = np.random.default_rng(SEED), {}
    for number in steps:
        params, state, loss = advance(params, state, *digits.batch(rng))
        losses[number] = float(loss)
    return params, state, losses


def main() -> int:
    """Train twice and compare."""
    options = command_line(__doc__, steps=600, quick_steps=60, plot="digits-jax.png")
    digits, steps = Digits.load(), range(1, options.steps + 1)

    with progress_bar(options) as bar:
        local, _, local_losses = train(optax.adam(LR), digits, bar.track(steps, description="local optax"))
        with a_server(options.target) as target:
            optimizer = stepwire.optax.adam(LR, server=target, label="digits in JAX")
            remote, state, losses = train(optimizer, digits, bar.track(steps, description="stepwire"))
            transport = optimizer.session(state).transport.name
            optimizer.close(state)

    apart = abs(losses[options.steps] - local_losses[options.steps])
    return Comparison(
        title="Digits MLP in JAX: Adam, local and on a server",
        curves={"local optax": local_losses, "stepwire": losses},
        facts={
            "transport": transport,
            "test accuracy, local": accuracy(local, digits),
            "test accuracy, stepwire": accuracy(remote, digits),
            "largest difference of a parameter": max(float(abs(local[name] - remote[name]).max()) for name in local),
            "difference of the last losses": apart,
        },
        checks={"the last losses differ by less than 1e-4": apart < 1e-4},
    ).show(options)


def accuracy(params: Any, digits: Digits) -> float:
    """Return the fraction of test images classified right."""
    return float((logits_of(params, digits.test_x).argmax(axis=1) == digits.test_y).mean())


if __name__ == "__main__":
    sys.exit(main())
