"""optax's accumulation of gradients, with one step on the server for each update."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["MultiSteps"]


class MultiSteps(optax.MultiSteps):
    """`optax.MultiSteps` around a transformation that contains one of this package, alone or in a chain.

    optax's class updates at each mini-step, and throws away all states but each k-th. A step on a server cannot be
    thrown away. This class updates at each k-th mini-step alone, with the same numbers. The gradients of the mini-steps
    accumulate in the program.

    Args and methods are optax's.
    """

    def __init__(self, opt: optax.GradientTransformation, *args: Any, **kwargs: Any) -> None:
        """Wrap a transformation; the arguments are those of `optax.MultiSteps`."""
        super().__init__(_at_the_last_mini_step(opt), *args, **kwargs)

    def update(self, updates: Any, state: optax.MultiStepsState, params: Any = None, **extra_args: Any) -> Any:
        """Accumulate, and update at each k-th mini-step; see `optax.MultiSteps`."""
        emit = jnp.asarray(state.mini_step == self._every_k_schedule(state.gradient_step) - 1)
        return super().update(updates, state, params, _emit=emit, **extra_args)


def _at_the_last_mini_step(opt: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that updates where `_emit` is true, and changes nothing elsewhere."""
    inner = optax.with_extra_args_support(opt)

    def update(updates: Any, state: Any, params: Any = None, *, _emit: Any, **extra: Any) -> Any:
        def now(updates: Any, state: Any) -> Any:
            return inner.update(updates, state, params, **extra)

        def later(updates: Any, state: Any) -> Any:
            shapes, _ = jax.eval_shape(now, updates, state)
            return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes), state

        return jax.lax.cond(_emit, now, later, updates, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)
