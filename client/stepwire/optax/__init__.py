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
    import optax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"stepwire.optax needs jax and optax, and {error.name!r} is not installed: pip install 'stepwire[jax]'",
        name=error.name,
    ) from error

from stepwire.optax.alias import adadelta, adam, adamax, adamw, amsgrad, lamb, lars, lion, nadam, nadamw, rmsprop, sgd
from stepwire.optax.connection import TransformationOptions
from stepwire.optax.transformation import RemoteState, RemoteTransformation, remote

__all__ = [
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

# The rules of optax that differ from the server's rules of the same names.
_DIFFERENT = {
    "adagrad": "optax adds eps inside the root, the server's rule (torch's) outside; "
    "`remote(stepwire.Adagrad(...), learning_rate)` is that one",
    "adamaxw": "the server's Adamax has L2 decay and no decoupled one",
    "radam": "optax adds eps to the corrected root, the server's rule (torch's) to the uncorrected one; "
    "`remote(stepwire.RAdam(...), learning_rate)` is that one",
}


def __getattr__(name: str) -> object:
    """Raise an error with the reason why a rule of optax is not in this package."""
    if name in _DIFFERENT:
        raise AttributeError(f"module 'stepwire.optax' has no attribute {name!r}: {_DIFFERENT[name]}")
    raise AttributeError(f"module 'stepwire.optax' has no attribute {name!r}")
