"""optax itself, compiled by jax: in float64 with 64-bit types enabled, in float32 without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from conformance.case import Build, Json
from conformance.inputs import Tensors

__all__ = ["VERSION", "OptaxReference", "optax_build"]

VERSION: Final = optax.__version__

_SLOTS: Final = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq", "trace": "momentum_buffer"}


class OptaxReference:
    """A gradient transformation of optax.

    Args:
        initial: the parameters.
        dtype: "float64" or "float32".
        make: builds the transformation.
    """

    def __init__(self, initial: Tensors, dtype: str, make: Callable[[], optax.GradientTransformation]) -> None:
        """Initialise the state and compile the step."""
        jax.config.update("jax_enable_x64", dtype == "float64")
        self._dtype = dtype
        transformation = make()
        self._parameters: Any = {name: jnp.asarray(value, dtype) for name, value in initial.items()}
        self._state: Any = transformation.init(self._parameters)

        @jax.jit
        def update(parameters: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = transformation.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state

        self._compiled = update

    def step(self, number: int, gradients: Mapping[str, np.ndarray | None]) -> Json:
        """Apply one step."""
        values = {name: jnp.asarray(gradients[name], self._dtype) for name in self._parameters}
        self._parameters, self._state = self._compiled(self._parameters, self._state, values)
        return {}

    def parameters(self) -> Tensors:
        """Return the parameters."""
        return {name: np.asarray(value) for name, value in self._parameters.items()}

    def slots(self) -> dict[str, Tensors]:
        """Return the moments. A trace is added to the parameters; a momentum buffer is subtracted."""
        found: dict[str, Tensors] = {}
        for record in _records(self._state):
            for field, slot in _SLOTS.items():
                if hasattr(record, field):
                    sign = -1.0 if field == "trace" else 1.0
                    values = getattr(record, field)
                    found[slot] = {name: np.asarray(sign * value) for name, value in values.items()}
        return found

    def tensor_steps(self) -> dict[str, int]:
        """Return nothing: optax counts once for all."""
        return {}


def _records(state: Any) -> list[Any]:
    """Return every named tuple inside a nest of tuples."""
    if hasattr(state, "inner_state"):
        return _records(state.inner_state)
    if hasattr(state, "_fields"):
        return [state]
    return [record for part in state for record in _records(part)] if isinstance(state, tuple) else []


def optax_build(make: Callable[[], optax.GradientTransformation]) -> Build:
    """Return a function that builds this reference from parameters and a precision."""
    return lambda initial, dtype: OptaxReference(initial, dtype, make)
