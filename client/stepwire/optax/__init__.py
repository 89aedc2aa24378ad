"""stepwire for JAX: optax's gradient transformations, stepped by a server.

    tx = stepwire.optax.adamw(1e-3, server="localhost:50051")
    state = tx.init(params)                              # creates the session
    updates, state = tx.update(grads, state, params)     # one step, under `jax.jit` too
    params = optax.apply_updates(params, updates)

`params, state = tx.step(params, grads, state)` does the last two lines and returns the server's parameters to the bit.
docs/jax.md is the manual.
"""

from __future__ import annotations

try:
    import jax  # noqa: F401
    import optax
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"stepwire.optax needs jax and optax, and {error.name!r} is not installed: pip install jax optax",
        name=error.name,
    ) from error

from stepwire.optax.alias import adadelta, adam, adamax, adamw, amsgrad, lamb, lars, lion, nadam, nadamw, rmsprop, sgd
from stepwire.optax.connection import TransformationOptions
from stepwire.optax.multi_steps import MultiSteps
from stepwire.optax.refused import refusal
from stepwire.optax.transformation import RemoteState, RemoteTransformation, remote

__all__ = [
    "MultiSteps",
    "RemoteState",
    "RemoteTransformation",
    "TransformationOptions",
    "adadelta",
    "adam",
    "adamax",
    "adamw",
    "amsgrad",
    "lamb",
    "lars",
    "lion",
    "nadam",
    "nadamw",
    "remote",
    "rmsprop",
    "sgd",
]


def __getattr__(name: str) -> object:
    """Return a function that refuses a transformation of optax which this package does not have, with the reason.

    Raises:
        AttributeError: the name is no transformation of optax's.
    """
    if (refused := refusal(name)) is not None:
        return refused
    hint = f"; it is optax's own: use optax.{name}" if hasattr(optax, name) else ""
    raise AttributeError(f"module 'stepwire.optax' has no attribute {name!r}{hint}")
