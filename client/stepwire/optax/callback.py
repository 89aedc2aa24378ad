"""Calls of the host from inside a JAX program, in order and once each, and the refusal of what would repeat them.

`io_callback(ordered=True)` is the one callback of JAX's that is neither dropped, repeated nor moved past another. What
it cannot be is transformed: a batch of steps of one optimizer, or the derivative of a step on a server, does not exist.
JAX's own refusals speak of callbacks; these say what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import io_callback

from stepwire.errors import UnsupportedFeatureError

__all__ = ["call_host", "check_place"]


def call_host(host: Callable[..., Any], results: Any, arguments: Sequence[Any]) -> Any:
    """Return what a function of the host makes of NumPy arrays, each time the program that is being traced runs.

    Args:
        host: takes the arguments as NumPy arrays and returns arrays of NumPy's, nested like `results`.
        results: `jax.ShapeDtypeStruct`s.
        arguments: arrays.

    Raises:
        UnsupportedFeatureError: when JAX vectorises or differentiates this.
    """

    def on_host(*arrays: Any) -> Any:
        return host(*map(np.asarray, arrays))

    @jax.custom_batching.custom_vmap  # type: ignore[untyped-decorator]
    def unbatched(*arrays: Any) -> Any:
        return io_callback(on_host, results, *arrays, ordered=True)

    @unbatched.def_vmap  # type: ignore[untyped-decorator]
    def batched(axis_size: int, in_batched: Any, *arrays: Any) -> NoReturn:
        raise _refused(
            "vmap",
            "a session is one optimizer and takes one step at a time. Average the gradients over the batch and update "
            "once, outside of jax.vmap; for several models, make a transformation and a state for each",
        )

    @jax.custom_jvp  # type: ignore[untyped-decorator]
    def undifferentiated(*arrays: Any) -> Any:
        return unbatched(*arrays)

    @undifferentiated.defjvp  # type: ignore[untyped-decorator]
    def differentiated(primals: Any, tangents: Any) -> NoReturn:
        raise _refused(
            "grad",
            "the step is computed on a server, and has no derivative here. Take jax.grad of the loss alone and update "
            "outside of it, or put jax.lax.stop_gradient around the gradients",
        )

    return undifferentiated(*arguments)


def check_place() -> None:
    """Refuse to be traced where several devices or processes would each call the host.

    Raises:
        UnsupportedFeatureError: inside `pmap` or `shard_map`, or in a program of several processes.
    """
    if jax.process_count() > 1:
        raise _refused(
            "processes",
            f"this program has {jax.process_count()} processes, and each would take the step. Gather the gradients in "
            "one process and let that one step",
        )
    mesh = getattr(jax.sharding, "get_abstract_mesh", None)  # before it, JAX refused ordered callbacks in pmap itself
    if mesh is not None and mesh().manual_axes:
        raise _refused(
            "pmap",
            "each device would take the step. Average the gradients in there (jax.lax.pmean), return them, and update "
            "outside of jax.pmap or jax.shard_map; under jax.jit arrays may be sharded over devices",
        )


def _refused(feature: str, remedy: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"stepwire.optax does not work inside of {feature}: {remedy}", metadata={"field": "update", "feature": feature}
    )
