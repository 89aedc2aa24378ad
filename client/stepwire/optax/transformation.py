"""An optax gradient transformation whose step is taken by a server."""

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
from stepwire.optax import sessions as held
from stepwire.optax.callback import call_host, check_place
from stepwire.optax.connection import Connection, RemoteOptions
from stepwire.optax.leaves import Leaves, bools_by_name, is_traced, leaves_of
from stepwire.optimizers import Optimizer
from stepwire.session import Session
from stepwire.wire.dtypes import dtype_named

__all__ = ["LearningRate", "RemoteState", "RemoteTransformation", "remote", "undecayed"]

LearningRate: TypeAlias = Any
"""A number; a function of the count of steps, as optax's schedules are; or a scalar of JAX's, sent with each step."""

Groups: TypeAlias = Callable[[Any], Sequence[dict[str, Any]]]
"""From parameters to the groups of their session."""


class RemoteState(NamedTuple):
    """What a JAX program carries of its session: data, which goes through `jit` and into checkpoints.

    Attributes:
        count: () int32, the steps that were taken.
        session: (k,) uint8, the session's id, filled up with zeros.
    """

    count: Any
    session: Any


class RemoteTransformation(optax.GradientTransformationExtraArgs):
    """A gradient transformation, with what there is to do with its session beside `init` and `update`.

    Made by `remote`, and by the functions of optax's names.
    """

    _remote: _Remote

    def step(self, params: Any, grads: Any, state: RemoteState) -> tuple[Any, RemoteState]:
        """Take one step and return the server's parameters as they are, and the next state; under `jax.jit` too.

        `optax.apply_updates(params, updates)` after `update` gives them up to rounding.

        Raises:
            StepMismatchError: the state is not the one that the session's next step follows on.
            StepwireError: as `update`.
        """
        return self._remote.step(params, grads, state)

    def resume(self, session_id: str, params: Any) -> tuple[Any, RemoteState]:
        """Go on with a session that exists: return its parameters and the state at the step that it is at.

        Takes the session's slot, and fences who held it.

        Args:
            session_id: which; `tx.session(state).session_id` told it.
            params: of the session's names, shapes and dtypes; their values do not matter.

        Raises:
            InvalidRequestError: the session has other tensors.
            SessionNotFoundError: it does not exist.
        """
        return self._remote.resume(session_id, params)

    def session(self, state: RemoteState) -> Session:
        """Return the session of a state, for `state()`, `last_result`, `pull(average=True)` and the like.

        Steps are for `update` alone: the state would not know of others.

        Raises:
            InvalidRequestError: it was closed, or the state comes from another process and has not been used in this.
        """
        return self._remote.session(state)

    def close(self, state: RemoteState) -> None:
        """End the session on its server, and the connection if nothing else uses it. Closing twice is harmless."""
        self._remote.close(state)


def remote(
    optimizer: Optimizer, learning_rate: LearningRate = None, **options: Unpack[RemoteOptions]
) -> RemoteTransformation:
    """Return the transformation of any rule that a server has, in its own formula.

    The functions of optax's names, such as `adam`, are this with the formula that optax has.

    Args:
        optimizer: the rule and its numbers.
        learning_rate: instead of the optimizer's `lr`: a number, a schedule as optax has them, or a scalar of JAX's.
        options: see `RemoteOptions`.

    Returns:
        A transformation whose updates are the server's new parameters minus `params`. So it comes last in a chain, and
        what changes parameters elsewhere is undone by the next step.

    Raises:
        InvalidRequestError: an option that does not exist or contradicts another.
    """
    return transformation(optimizer, learning_rate, options, None)


def transformation(
    optimizer: Optimizer, learning_rate: LearningRate, options: RemoteOptions, groups: Groups | None
) -> RemoteTransformation:
    """Return the transformation of a rule whose groups may depend on the parameters.

    Raises:
        InvalidRequestError: as `remote`, or there are groups of both kinds.
    """
    connection, session_options = Connection.read(options)
    if groups is not None and "groups" in session_options:
        raise InvalidRequestError.of(
            "groups", "a mask makes the groups already; leave it out and say in `groups` what it says"
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
    """Return the groups of a weight decay's mask: what it leaves out is one with no decay."""
    if mask is None or mask is True:
        return None

    def groups(params: Any) -> list[dict[str, Any]]:
        left_out = [name for name, decays in bools_by_name(mask, params, field).items() if not decays]
        return [{"params": left_out, "weight_decay": 0.0}] if left_out else []

    return groups


class _Remote:
    """What a transformation does. It is a description: all that changes is in states and in `held`."""

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
        """Create the session. Traced, it is created each time the program runs, and `jax.eval_shape` creates none."""
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

        The difference is taken in float32, also for parameters of half precision, so that `optax.apply_updates`, which
        adds in the wider dtype and rounds once, gives the server's parameters.
        """
        if params is None:
            raise InvalidRequestError.of(
                "params", "updates are differences from them; call update(grads, state, params)"
            )
        leaves, answer, after = self._step(params, updates, state)
        differences = [
            new.astype(jnp.float32) - old.astype(jnp.float32) for new, old in zip(answer, leaves.arrays, strict=True)
        ]
        return jax.tree.unflatten(leaves.structure, differences), after

    def step(self, params: Any, grads: Any, state: RemoteState) -> tuple[Any, RemoteState]:
        """See `RemoteTransformation.step`."""
        leaves, answer, after = self._step(params, grads, state)
        exact = [new.astype(old.dtype) for new, old in zip(answer, leaves.arrays, strict=True)]
        return jax.tree.unflatten(leaves.structure, exact), after

    def resume(self, session_id: str, params: Any) -> tuple[Any, RemoteState]:
        """See `RemoteTransformation.resume`."""
        leaves = leaves_of(params, "params")
        session = held.client(self._connection).session(session_id)
        shapes = {name: tuple(array.shape) for name, array in zip(leaves.names, leaves.arrays, strict=True)}
        if session.shapes != shapes:
            raise InvalidRequestError.of(
                "params", f"the session has the tensors {session.shapes}, and the parameters are {shapes}"
            )
        found = held.adopt(session, leaves.names, self._connection).session
        named: Any = found.pull()
        values = [jnp.asarray(named[name], array.dtype) for name, array in zip(*leaves[:2], strict=True)]
        state = RemoteState(jnp.asarray(found.applied_step, jnp.int32), jnp.asarray(self._encoded(session_id)))
        return jax.tree.unflatten(leaves.structure, values), state

    def session(self, state: RemoteState) -> Session:
        """See `RemoteTransformation.session`."""
        jax.block_until_ready(state)  # the id may be there before the step that it came out of has been taken
        return held.known(_decoded(state.session)).session

    def close(self, state: RemoteState) -> None:
        """See `RemoteTransformation.close`."""
        jax.block_until_ready(state)
        session_id = _decoded(state.session)
        if held.is_held(session_id):
            held.known(session_id).session.close()
            held.let_go(session_id)

    def _step(self, params: Any, grads: Any, state: RemoteState) -> tuple[Leaves, list[Any], RemoteState]:
        """Take a step, now or in the program that is being traced; return the server's parameters."""
        check_place()
        leaves, given = leaves_of(params, "params"), leaves_of(grads, "grads")
        if given.structure != leaves.structure:
            raise InvalidRequestError.of(
                "grads", f"their tree is {given.structure}, and that of the parameters {leaves.structure}"
            )
        reply = dtype_named(self._options.get("reply_dtype", leaves.wire_dtype), "reply_dtype")
        host = functools.partial(self._step_on_host, leaves.names, reply)
        arguments = [state.session, state.count, *self._rate(state.count), *given.arrays]
        if not is_traced(jax.tree.leaves((arguments, leaves.arrays))):
            count, *answer = (jnp.asarray(array) for array in host(*map(np.asarray, arguments)))
        else:
            shapes = [jax.ShapeDtypeStruct(array.shape, reply) for array in leaves.arrays]
            count, *answer = call_host(host, [jax.ShapeDtypeStruct((), jnp.int32), *shapes], arguments)
        return leaves, answer, RemoteState(count, state.session)

    def _rate(self, count: Any) -> list[Any]:
        """Return the learning rate that a step brings, if it brings one."""
        rate = self._learning_rate(count) if callable(self._learning_rate) else self._learning_rate
        return [jnp.asarray(rate, jnp.float32)] if _changes(self._learning_rate) else []

    # --- on the host ------------------------------------------------------------------------------------------

    def _create(
        self, names: Sequence[str], dtype: np.dtype[Any], options: dict[str, Any], *arrays: npt.NDArray[Any]
    ) -> npt.NDArray[np.uint8]:
        session = held.client(self._connection).create_session(
            dict(zip(names, arrays, strict=True)),
            optimizer=self._optimizer,
            **({"gradient_dtype": dtype, "reply_dtype": dtype} | options),
        )
        held.adopt(session, names, self._connection)
        return self._encoded(session.session_id)

    def _step_on_host(
        self, names: Sequence[str], reply: np.dtype[Any], identity: Any, count: Any, *rest: Any
    ) -> list[npt.NDArray[Any]]:
        """Take the step after `count`; return its number and the parameters.

        The number comes from here, though the program could count, so that a state is there when its step has been
        taken, and not before.
        """
        rate, gradients = (float(rest[0]), rest[1:]) if _changes(self._learning_rate) else (None, rest)
        found = held.held(_decoded(identity), names, self._connection)
        return [np.asarray(count + 1, np.int32), *found.step(int(count), gradients, rate, reply)]

    def _encoded(self, session_id: str) -> npt.NDArray[np.uint8]:
        raw = session_id.encode("ascii")
        if len(raw) > self._connection.id_bytes:
            raise InvalidRequestError.of(
                "session_id", f"{session_id!r} is longer than the ids of {self._connection.server!r} are"
            )
        return np.frombuffer(raw.ljust(self._connection.id_bytes, b"\0"), np.uint8)


def _own_rate(optimizer: Optimizer, learning_rate: LearningRate) -> Any:
    """Return the session's own learning rate: 0 where each step brings one, so that a step without would show."""
    if learning_rate is None:
        return optimizer.hyperparameters().lr
    return 0.0 if _changes(learning_rate) else learning_rate


def _changes(learning_rate: LearningRate) -> bool:
    """Tell whether each step brings its own learning rate."""
    return callable(learning_rate) or isinstance(learning_rate, jax.Array)


def _decoded(identity: Any) -> str:
    return np.asarray(identity, np.uint8).tobytes().rstrip(b"\0").decode("ascii", "replace")
