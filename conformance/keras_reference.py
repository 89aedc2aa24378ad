"""Keras itself on its jax backend, compiled; its floatx and jax's 64-bit types follow the precision asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from conformance.case import Build, Json
from conformance.inputs import Tensors

os.environ["KERAS_BACKEND"] = "jax"

import keras

__all__ = ["VERSION", "KerasReference", "keras_build"]

VERSION: Final = keras.__version__

_SLOTS: Final = {"_momentums": "exp_avg", "_velocities": "exp_avg_sq", "_velocity_hats": "max_exp_avg_sq"}


class KerasReference:
    """An optimizer of Keras, through `stateless_apply`.

    Args:
        initial: the parameters.
        dtype: "float64" or "float32".
        make: builds the optimizer.
    """

    def __init__(self, initial: Tensors, dtype: str, make: Callable[[], keras.optimizers.Optimizer]) -> None:
        """Build the variables and compile the step."""
        jax.config.update("jax_enable_x64", dtype == "float64")
        keras.config.set_floatx(dtype)
        self._names, self._dtype = list(initial), dtype
        variables = [keras.Variable(value, dtype=dtype, name=name) for name, value in initial.items()]
        self._optimizer = make()
        self._optimizer.build(variables)
        self._values = [jnp.asarray(variable.value) for variable in variables]
        self._state = [jnp.asarray(variable.value) for variable in self._optimizer.variables]
        optimizer = self._optimizer
        self._compiled = jax.jit(lambda state, grads, values: optimizer.stateless_apply(state, grads, values))

    def step(self, number: int, gradients: Mapping[str, np.ndarray | None]) -> Json:
        """Apply one step."""
        values = [jnp.asarray(gradients[name], self._dtype) for name in self._names]
        self._values, self._state = self._compiled(self._state, values, self._values)
        return {}

    def parameters(self) -> Tensors:
        """Return the parameters."""
        return {name: np.asarray(value) for name, value in zip(self._names, self._values, strict=True)}

    def slots(self) -> dict[str, Tensors]:
        """Return the moments."""
        found: dict[str, Tensors] = {}
        for attribute, slot in _SLOTS.items():
            owned: list[Any] = getattr(self._optimizer, attribute, None) or []
            if owned:
                found[slot] = dict(zip(self._names, map(self._value_of, owned), strict=True))
        return found

    def _value_of(self, variable: Any) -> np.ndarray:
        places = [index for index, mine in enumerate(self._optimizer.variables) if mine is variable]
        return np.asarray(self._state[places[0]])

    def tensor_steps(self) -> dict[str, int]:
        """Return nothing: Keras counts once for all."""
        return {}


def keras_build(make: Callable[[], keras.optimizers.Optimizer]) -> Build:
    """Return a function that builds this reference from parameters and a precision."""
    return lambda initial, dtype: KerasReference(initial, dtype, make)
