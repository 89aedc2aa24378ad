"""Updates of optax transformations that are interrupted, at points of the caller's thread and lines of the errand's.

A program that is interrupted has the state and the parameters of before, and updates them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.integration.interrupts.places import chosen
from tests.support.interrupts import Arrival, Departure
from tests.support.numpy_server import numpy_server

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import stepwire.optax  # noqa: E402

SIZE = 40_000


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with numpy_server(max_chunk_bytes=64 << 10) as server:
        yield server.target


def gradient(number: int) -> Any:
    return {"w": jnp.asarray(np.random.default_rng(number).standard_normal(SIZE).astype(np.float32))}


class Training:
    """A program after its first update."""

    def __init__(self, target: str) -> None:
        self._transformation = stepwire.optax.adam(0.01, server=target, transport="tcp")
        self._params: Any = {"w": jnp.zeros(SIZE)}
        self._state = self._transformation.init(self._params)
        self.update(gradient(1))

    def update(self, grads: Any) -> None:
        updates, state = self._transformation.update(grads, self._state, self._params)
        self._params, self._state = optax.apply_updates(self._params, updates), state

    def course(self, *numbers: int) -> bytes:
        for number in numbers:
            self.update(gradient(number))
        return np.asarray(self._params["w"]).tobytes()

    def interrupted(self, place: Arrival | Departure) -> bool:
        """Make the second update, and tell whether it was interrupted before the program had its state."""
        grads, before = gradient(2), self._state
        try:
            with place:
                self.update(grads)
        except KeyboardInterrupt:
            return self._state is before
        except SystemError as error:  # of NumPy, whose call of JAX's `__numpy_dtype__` was interrupted
            if not isinstance(error.__cause__, KeyboardInterrupt):
                raise
            return self._state is before
        return False

    def close(self) -> None:
        self._transformation.close(self._state)


def test_an_update_after_an_interrupt_is_that_update(target: str) -> None:
    training = Training(target)
    expected, wrong = training.course(2, 3), []
    training.close()
    for kind in (Arrival, Departure):
        training, counted = Training(target), kind()
        assert not training.interrupted(counted)
        training.close()
        count = counted.points if isinstance(counted, Arrival) else counted.lines
        for at in chosen(count, "optax"):
            training = Training(target)
            again = training.interrupted(kind(at))
            if training.course(*(2, 3) if again else (3,)) != expected:
                wrong.append((kind.__name__, at))
            training.close()
    assert wrong == []
