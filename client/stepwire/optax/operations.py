"""The operations of a transformation: `init`, `update` and the others, traced or not, and their halves on the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from stepwire.connection.errands import by_errand
from stepwire.errors import InvalidRequestError
from stepwire.optax import sessions
from stepwire.optax.callback import call_host, check_place
from stepwire.optax.checkpoint import PARAM, arrays_of, snapshot_of
from stepwire.optax.connection import Connection
from stepwire.optax.leaves import Leaves, is_traced, leaves_of
from stepwire.optax.program import masters
from stepwire.optax.sessions import ProgramStep
from stepwire.optimizers import Optimizer
from stepwire.session import Session
from stepwire.wire.dtypes import dtype_named

__all__ = ["Groups", "LearningRate", "Operations", "RemoteState", "changes"]

LearningRate: TypeAlias = Any
"""A number; a function of the number of steps, as optax's schedules are; or a scalar of JAX's, sent with each step."""

Groups: TypeAlias = Callable[[Any], Sequence[dict[str, Any]]]
"""A function from parameters to the groups of their session."""


class RemoteState(NamedTuple):
    """The reference of a JAX program to its session: data, which goes through `jit` and into checkpoints.

    Attributes:
        count: () int32, the number of applied steps.
        session: (k,) uint8, the session's id, padded with zeros.
    """

    count: Any
    session: Any


class Operations:
    """The operations of a transformation. The object is immutable: states and `sessions` have all that changes."""

    def __init__(
        self,
        optimizer: Optimizer,
        learning_rate: LearningRate,
        connection: Connection,
        options: dict[str, Any],
        groups: Groups | None,
    ) -> None:
        """Describe the sessions of a transformation.

        Args:
            optimizer: the rule and its numbers, with the session's own learning rate.
            learning_rate: the learning rate of the transformation.
            connection: the servers.
            options: the options of the sessions.
            groups: a function from the parameters to the groups; None for none.
        """
        self._optimizer = optimizer
        self._learning_rate = learning_rate
        self._connection = connection
        self._options = options
        self._groups = groups

    def init(self, params: Any) -> RemoteState:
        """Create the session. A traced `init` creates a session at each run of the program; `jax.eval_shape` none."""
        check_place()
        leaves = leaves_of(params, "params")
        options = dict(self._options)
        if self._groups is not None:
            options["groups"] = self._groups(params)
        create = functools.partial(self._create, leaves.names, leaves.wire_dtype, options)
        count = jnp.zeros((), jnp.int32)
        if not is_traced(leaves.arrays):
            return RemoteState(count, jnp.asarray(create(*map(np.asarray, leaves.arrays))))
        shape = jax.ShapeDtypeStruct((self._connection.id_bytes,), jnp.uint8)
        return RemoteState(count, call_host(create, shape, leaves.arrays))

    def update(self, updates: Any, state: RemoteState, params: Any = None, **extra: Any) -> tuple[Any, RemoteState]:
        """Return the server's parameters minus `params`, and the next state.

        The difference is in float32, also for parameters of half precision. `optax.apply_updates` adds in the wider
        dtype and rounds once, so the sum is the server's parameters.
        """
        if params is None:
            raise InvalidRequestError.of(
                "params", "updates are differences from them; call update(grads, state, params)"
            )
        leaves, reply, after = self._step(params, updates, state, exact=False)
        differences = [
            new.astype(jnp.float32) - old.astype(jnp.float32) for new, old in zip(reply, leaves.arrays, strict=True)
        ]
        return jax.tree.unflatten(leaves.structure, differences), after

    def step(self, params: Any, grads: Any, state: RemoteState) -> tuple[Any, RemoteState]:
        """See `RemoteTransformation.step`."""
        leaves, reply, after = self._step(params, grads, state, exact=True)
        exact = [new.astype(old.dtype) for new, old in zip(reply, leaves.arrays, strict=True)]
        return jax.tree.unflatten(leaves.structure, exact), after

    def resume(self, session_id: str, params: Any) -> tuple[Any, RemoteState]:
        """See `RemoteTransformation.resume`."""
        leaves = leaves_of(params, "params")
        session = sessions.client(self._connection).session(session_id)
        shapes = {name: tuple(array.shape) for name, array in zip(leaves.names, leaves.arrays, strict=True)}
        if session.shapes != shapes:
            raise InvalidRequestError.of(
                "params", f"the session has the tensors {session.shapes}, and the parameters are {shapes}"
            )
        session.attach()  # from now on no other client steps it
        named: Any = session.pull()
        values = [np.asarray(named[name], array.dtype) for name, array in zip(*leaves[:2], strict=True)]
        found = sessions.track(session, leaves.names, self._connection, values).session
        state = RemoteState(jnp.asarray(found.applied_step, jnp.int32), jnp.asarray(self._encoded(session_id)))
        return jax.tree.unflatten(leaves.structure, list(map(jnp.array, values))), state

    def to_arrays(self, state: RemoteState) -> dict[str, npt.NDArray[Any]]:
        """See `RemoteTransformation.to_arrays`."""
        _check_concrete(state, "state")
        return arrays_of(sessions.tracked(_decoded(state.session)).state_at(int(state.count)))

    def from_arrays(self, arrays: Mapping[str, Any], params: Any) -> RemoteState:
        """See `RemoteTransformation.from_arrays`."""
        _check_concrete((arrays, params), "arrays")
        leaves = leaves_of(params, "params")
        named = {name: np.asarray(array) for name, array in zip(leaves.names, leaves.arrays, strict=True)}
        snapshot = snapshot_of(arrays, {name: array.shape for name, array in named.items()})
        snapshot.slots[PARAM] = masters(snapshot.slots[PARAM], named, self._reply_dtype(leaves))
        new = self.init(params)
        try:
            self.session(new).load_state(snapshot)
        except BaseException:
            self.close(new)
            raise
        return RemoteState(jnp.asarray(snapshot.step, jnp.int32), new.session)

    def session(self, state: RemoteState) -> Session:
        """See `RemoteTransformation.session`."""
        jax.block_until_ready(state)  # the id may be ready before the step of the state
        return sessions.tracked(_decoded(state.session)).session

    def close(self, state: RemoteState) -> None:
        """See `RemoteTransformation.close`."""
        jax.block_until_ready(state)
        session_id = _decoded(state.session)
        if sessions.is_tracked(session_id):
            sessions.tracked(session_id).session.close()
            sessions.forget(session_id)

    def _step(
        self, params: Any, grads: Any, state: RemoteState, *, exact: bool
    ) -> tuple[Leaves, list[Any], RemoteState]:
        """Apply a step, now or in the traced program; return the server's parameters.

        Args:
            params: the parameters.
            grads: the gradients.
            state: the state of the step before.
            exact: True if the program gets the server's parameters, and not their difference from `params`.
        """
        check_place()
        leaves, given = leaves_of(params, "params"), leaves_of(grads, "grads")
        if given.structure != leaves.structure:
            raise InvalidRequestError.of(
                "grads", f"their tree is {given.structure}, and that of the parameters {leaves.structure}"
            )
        reply_dtype = self._reply_dtype(leaves)
        host = functools.partial(self._apply, leaves.names, reply_dtype, exact)
        arguments = [state.session, state.count, *self._rate(state.count), *given.arrays, *leaves.arrays]
        if not is_traced(jax.tree.leaves(arguments)):
            count, *reply = (jnp.asarray(array) for array in host(*map(np.asarray, arguments)))
        else:
            shapes = [jax.ShapeDtypeStruct(array.shape, reply_dtype) for array in leaves.arrays]
            count, *reply = call_host(host, [jax.ShapeDtypeStruct((), jnp.int32), *shapes], arguments)
        return leaves, reply, RemoteState(count, state.session)

    def _reply_dtype(self, leaves: Leaves) -> np.dtype[Any]:
        return dtype_named(self._options.get("reply_dtype", leaves.wire_dtype), "reply_dtype")

    def _rate(self, count: Any) -> list[Any]:
        """Return the learning rate that a step sends, if it sends one."""
        rate = self._learning_rate(count) if callable(self._learning_rate) else self._learning_rate
        return [jnp.asarray(rate, jnp.float32)] if changes(self._learning_rate) else []

    # --- on the host ------------------------------------------------------------------------------------------

    @by_errand
    def _create(
        self, names: Sequence[str], dtype: np.dtype[Any], options: dict[str, Any], *arrays: npt.NDArray[Any]
    ) -> npt.NDArray[np.uint8]:
        session = sessions.client(self._connection).create_session(
            dict(zip(names, arrays, strict=True)),
            optimizer=self._optimizer,
            **({"gradient_dtype": dtype, "reply_dtype": dtype} | options),
        )
        sessions.track(session, names, self._connection, [np.array(array) for array in arrays])
        return self._encoded(session.own_id)

    @by_errand
    def _apply(
        self, names: Sequence[str], reply_dtype: np.dtype[Any], exact: bool, identity: Any, count: Any, *rest: Any
    ) -> list[npt.NDArray[Any]]:
        """Apply the step after `count`; return its number and the parameters.

        The number comes from the host, though the program could count, so that a state is not ready before its step is
        applied.
        """
        rate, arrays = (float(rest[0]), rest[1:]) if changes(self._learning_rate) else (None, rest)
        gradients, parameters = arrays[: len(names)], arrays[len(names) :]
        found = sessions.find(_decoded(identity), names, self._connection)
        reply = found.step(ProgramStep(int(count), gradients, parameters, rate, exact), reply_dtype)
        return [np.asarray(count + 1, np.int32), *reply]

    def _encoded(self, session_id: str) -> npt.NDArray[np.uint8]:
        raw = session_id.encode("ascii")
        if len(raw) > self._connection.id_bytes:
            raise InvalidRequestError.of(
                "session_id", f"{session_id!r} is longer than an id of {self._connection.server!r}"
            )
        return np.frombuffer(raw.ljust(self._connection.id_bytes, b"\0"), np.uint8)


def changes(learning_rate: LearningRate) -> bool:
    """Tell whether each step sends its own learning rate."""
    return callable(learning_rate) or isinstance(learning_rate, jax.Array)


def _decoded(identity: Any) -> str:
    return np.asarray(identity, np.uint8).tobytes().rstrip(b"\0").decode("ascii", "replace")


def _check_concrete(values: Any, field: str) -> None:
    """Refuse traced values: a program makes checkpoints between its steps.

    Raises:
        InvalidRequestError: a value is traced.
    """
    if any(isinstance(value, jax.core.Tracer) for value in jax.tree.leaves(values)):
        raise InvalidRequestError.of(field, "is traced; call to_arrays and from_arrays outside of jax.jit")
