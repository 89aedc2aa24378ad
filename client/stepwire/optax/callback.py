"""Calls of the host from a JAX program, in order and once each, and the refusal of transformations that repeat calls.

JAX neither drops, repeats nor reorders the calls of `io_callback(ordered=True)`, and of no other callback. Such a call
cannot be transformed: a batch of steps of one optimizer and the derivative of a remote step do not exist.
JAX's own errors name the callback; the errors of this module name the remedy.
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
    """Return the results of a host function, which runs each time that the traced program runs.

    Args:
        host: a function of NumPy arrays that returns NumPy arrays, nested like `results`.
        results: the shapes and dtypes of the results, as `jax.ShapeDtypeStruct`s.
        arguments: the arguments, as JAX arrays.

    Returns:
        The results, as JAX arrays.

    Raises:
        UnsupportedFeatureError: JAX vectorises or differentiates the call.
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
            "a session is one optimizer and applies one step at a time. Average the gradients over the batch and "
            "update once, outside of jax.vmap; for several models, make a transformation and a state for each",
        )

    @jax.custom_jvp  # type: ignore[untyped-decorator]
    def undifferentiated(*arrays: Any) -> Any:
        return unbatched(*arrays)

    @undifferentiated.defjvp  # type: ignore[untyped-decorator]
    def differentiated(primals: Any, tangents: Any) -> NoReturn:
        raise _refused(
            "grad",
            "the step is computed on a server, and has no derivative. Apply jax.grad to the loss alone and update "
            "outside of it, or put jax.lax.stop_gradient around the gradients",
        )

    return undifferentiated(*arguments)


def check_place() -> None:
    """Refuse a trace in which several devices or processes would each call the host.

    Raises:
        UnsupportedFeatureError: the caller is inside `pmap` or `shard_map`, or in a program of several processes.
    """
    if jax.process_count() > 1:
        raise _refused(
            "processes",
            f"this program has {jax.process_count()} processes, and each would send the step. Gather the gradients in "
            "one process, and step in that process alone",
        )
    mesh = getattr(
        jax.sharding, "get_abstract_mesh", None
    )  # older releases refuse ordered callbacks in pmap themselves
    if mesh is not None and mesh().manual_axes:
        raise _refused(
            "pmap",
            "each device would send the step. Average the gradients inside (jax.lax.pmean), return them, and update "
            "outside of jax.pmap or jax.shard_map; under jax.jit arrays may be sharded over devices",
        )


def _refused(feature: str, remedy: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"stepwire.optax does not work inside of {feature}: {remedy}", metadata={"field": "update", "feature": feature}
    )
