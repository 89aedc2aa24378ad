"""An optax gradient transformation with its step on a server."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from stepwire.errors import InvalidRequestError
from stepwire.optax import sessions
from stepwire.optax.callback import call_host, check_place
from stepwire.optax.connection import Connection, TransformationOptions
from stepwire.optax.leaves import Leaves, bools_by_name, is_traced, leaves_of
from stepwire.optimizers import Optimizer
from stepwire.session import Session
from stepwire.wire.dtypes import dtype_named

__all__ = ["LearningRate", "RemoteState", "RemoteTransformation", "remote", "undecayed"]

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


class RemoteTransformation(optax.GradientTransformationExtraArgs):
    """A gradient transformation with operations on its session besides `init` and `update`.

    `remote` and the functions of optax's names return such transformations.
    """

    _remote: _Remote

    def step(self, params: Any, grads: Any, state: RemoteState) -> tuple[Any, RemoteState]:
        """Apply one step and return the server's parameters to the bit, and the next state; under `jax.jit` too.

        `optax.apply_updates(params, updates)` after `update` gives the same parameters up to rounding.

        Args:
            params: the parameters, for their structure and dtypes.
            grads: the gradients, in the same structure.
            state: the state of the step before.

        Returns:
            The parameters after the step, and the next state.

        Raises:
            StepMismatchError: the session's next step is not the step after the state.
            StepwireError: as `update`.
        """
        return self._remote.step(params, grads, state)

    def resume(self, session_id: str, params: Any) -> tuple[Any, RemoteState]:
        """Attach to an existing session, and return its parameters and its state.

        A client that was attached before is fenced.

        Args:
            session_id: the id of the session, from `tx.session(state).session_id`.
            params: parameters of the session's names, shapes and dtypes; their values do not matter.

        Returns:
            The session's parameters, and the state at the session's step.

        Raises:
            InvalidRequestError: the session has other tensors.
            SessionNotFoundError: the session does not exist.
        """
        return self._remote.resume(session_id, params)

    def session(self, state: RemoteState) -> Session:
        """Return the session of a state, for `state()`, `last_result`, `pull(average=True)` and the like.

        Use `update` alone for steps: the state does not count other steps.

        Raises:
            InvalidRequestError: the session was closed, or the state comes from another process and was not used in
                this one.
        """
        return self._remote.session(state)

    def close(self, state: RemoteState) -> None:
        """Close the session, and its connection if no other session uses it. Closing twice is harmless."""
        self._remote.close(state)


def remote(
    optimizer: Optimizer, learning_rate: LearningRate = None, **options: Unpack[TransformationOptions]
) -> RemoteTransformation:
    """Return the transformation of any of the server's rules, in the server's formula.

    The functions of optax's names, such as `adam`, return transformations in optax's formula.

    Args:
        optimizer: the rule and its numbers.
        learning_rate: a number, a schedule as optax has them, or a scalar of JAX's, instead of the optimizer's `lr`.
        options: see `TransformationOptions`.

    Returns:
        A transformation with updates that are the server's new parameters minus `params`. So the transformation comes
        last in a chain, and the next step undoes a change of parameters by other code.

    Raises:
        InvalidRequestError: an option does not exist, or contradicts another.
    """
    return transformation(optimizer, learning_rate, options, None)


def transformation(
    optimizer: Optimizer, learning_rate: LearningRate, options: TransformationOptions, groups: Groups | None
) -> RemoteTransformation:
    """Return the transformation of a rule with groups that may depend on the parameters.

    Args:
        optimizer: the rule and its numbers.
        learning_rate: as for `remote`.
        options: see `TransformationOptions`.
        groups: a function from the parameters to the groups; None for none.

    Returns:
        The transformation.

    Raises:
        InvalidRequestError: as `remote`, or there are groups in the options too.
    """
    connection, session_options = Connection.read(options)
    if groups is not None and "groups" in session_options:
        raise InvalidRequestError.of(
            "groups", "a mask makes the groups already; leave the mask out and put its tensors into `groups`"
        )
    own: dict[str, Any] = {
        "lr": _own_rate(optimizer, learning_rate)
    }  # a number that every rule has, and declares itself
    optimizer = dataclasses.replace(optimizer, **own)
    if "clip_grad_norm" in session_options:
        session_options.setdefault("clip_formula", "optax")
    made = _Remote(optimizer, learning_rate, connection, session_options, groups)
    new = RemoteTransformation(made.init, made.update)
    new._remote = made
    return new


def undecayed(mask: Any, field: str) -> Groups | None:
    """Return the groups of a weight decay's mask: the tensors outside the mask are a group without decay."""
    if mask is None or mask is True:
        return None

    def groups(params: Any) -> list[dict[str, Any]]:
        left_out = [name for name, decays in bools_by_name(mask, params, field).items() if not decays]
        return [{"params": left_out, "weight_decay": 0.0}] if left_out else []

    return groups


class _Remote:
    """The operations of a transformation. The object is immutable: states and `sessions` have all that changes."""

    def __init__(
        self,
        optimizer: Optimizer,
        learning_rate: LearningRate,
        connection: Connection,
        options: dict[str, Any],
        groups: Groups | None,
    ) -> None:
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
        leaves, reply, after = self._step(params, updates, state)
        differences = [
            new.astype(jnp.float32) - old.astype(jnp.float32) for new, old in zip(reply, leaves.arrays, strict=True)
        ]
        return jax.tree.unflatten(leaves.structure, differences), after

    def step(self, params: Any, grads: Any, state: RemoteState) -> tuple[Any, RemoteState]:
        """See `RemoteTransformation.step`."""
        leaves, reply, after = self._step(params, grads, state)
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
        found = sessions.track(session, leaves.names, self._connection).session
        named: Any = found.pull()
        values = [jnp.asarray(named[name], array.dtype) for name, array in zip(*leaves[:2], strict=True)]
        state = RemoteState(jnp.asarray(found.applied_step, jnp.int32), jnp.asarray(self._encoded(session_id)))
        return jax.tree.unflatten(leaves.structure, values), state

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

    def _step(self, params: Any, grads: Any, state: RemoteState) -> tuple[Leaves, list[Any], RemoteState]:
        """Apply a step, now or in the traced program; return the server's parameters."""
        check_place()
        leaves, given = leaves_of(params, "params"), leaves_of(grads, "grads")
        if given.structure != leaves.structure:
            raise InvalidRequestError.of(
                "grads", f"their tree is {given.structure}, and that of the parameters {leaves.structure}"
            )
        reply_dtype = dtype_named(self._options.get("reply_dtype", leaves.wire_dtype), "reply_dtype")
        host = functools.partial(self._apply, leaves.names, reply_dtype)
        arguments = [state.session, state.count, *self._rate(state.count), *given.arrays]
        if not is_traced(jax.tree.leaves((arguments, leaves.arrays))):
            count, *reply = (jnp.asarray(array) for array in host(*map(np.asarray, arguments)))
        else:
            shapes = [jax.ShapeDtypeStruct(array.shape, reply_dtype) for array in leaves.arrays]
            count, *reply = call_host(host, [jax.ShapeDtypeStruct((), jnp.int32), *shapes], arguments)
        return leaves, reply, RemoteState(count, state.session)

    def _rate(self, count: Any) -> list[Any]:
        """Return the learning rate that a step sends, if it sends one."""
        rate = self._learning_rate(count) if callable(self._learning_rate) else self._learning_rate
        return [jnp.asarray(rate, jnp.float32)] if _changes(self._learning_rate) else []

    # --- on the host ------------------------------------------------------------------------------------------

    def _create(
        self, names: Sequence[str], dtype: np.dtype[Any], options: dict[str, Any], *arrays: npt.NDArray[Any]
    ) -> npt.NDArray[np.uint8]:
        session = sessions.client(self._connection).create_session(
            dict(zip(names, arrays, strict=True)),
            optimizer=self._optimizer,
            **({"gradient_dtype": dtype, "reply_dtype": dtype} | options),
        )
        sessions.track(session, names, self._connection)
        return self._encoded(session.session_id)

    def _apply(
        self, names: Sequence[str], reply_dtype: np.dtype[Any], identity: Any, count: Any, *rest: Any
    ) -> list[npt.NDArray[Any]]:
        """Apply the step after `count`; return its number and the parameters.

        The number comes from the host, though the program could count, so that a state is not ready before its step is
        applied.
        """
        rate, gradients = (float(rest[0]), rest[1:]) if _changes(self._learning_rate) else (None, rest)
        found = sessions.find(_decoded(identity), names, self._connection)
        return [np.asarray(count + 1, np.int32), *found.step(int(count), gradients, rate, reply_dtype)]

    def _encoded(self, session_id: str) -> npt.NDArray[np.uint8]:
        raw = session_id.encode("ascii")
        if len(raw) > self._connection.id_bytes:
            raise InvalidRequestError.of(
                "session_id", f"{session_id!r} is longer than an id of {self._connection.server!r}"
            )
        return np.frombuffer(raw.ljust(self._connection.id_bytes, b"\0"), np.uint8)


def _own_rate(optimizer: Optimizer, learning_rate: LearningRate) -> Any:
    """Return the session's own learning rate: 0 if each step sends one, so that a step without one changes nothing."""
    if learning_rate is None:
        return optimizer.hyperparameters().lr
    return 0.0 if _changes(learning_rate) else learning_rate


def _changes(learning_rate: LearningRate) -> bool:
    """Tell whether each step sends its own learning rate."""
    return callable(learning_rate) or isinstance(learning_rate, jax.Array)


def _decoded(identity: Any) -> str:
    return np.asarray(identity, np.uint8).tobytes().rstrip(b"\0").decode("ascii", "replace")
