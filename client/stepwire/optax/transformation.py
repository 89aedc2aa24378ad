"""An optax gradient transformation with its step on a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Unpack

import numpy.typing as npt
import optax

from stepwire.errors import InvalidRequestError
from stepwire.optax.connection import Connection, TransformationOptions
from stepwire.optax.leaves import bools_by_name
from stepwire.optax.operations import Groups, LearningRate, Operations, RemoteState, changes
from stepwire.optimizers import Optimizer
from stepwire.session import Session

__all__ = ["LearningRate", "RemoteState", "RemoteTransformation", "remote", "undecayed"]


class RemoteTransformation(optax.GradientTransformationExtraArgs):
    """A gradient transformation with operations on its session besides `init` and `update`.

    `remote` and the functions of optax's names return such transformations.
    """

    _operations: Operations

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
        return self._operations.step(params, grads, state)

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
        return self._operations.resume(session_id, params)

    def to_arrays(self, state: RemoteState) -> dict[str, npt.NDArray[Any]]:
        """Return the state of the session as arrays, for a checkpoint: moments, counts, parameters in float32.

        Args:
            state: the state that the last update returned.

        Returns:
            A flat dict of NumPy arrays: "count", and "exp_avg/encoder/w" and the like for each slot and tensor.

        Raises:
            InvalidRequestError: as `session`, or the state is traced.
            StepMismatchError: the session is not at the step of the state.
            StepwireError: as `Session.state`.
        """
        return self._operations.to_arrays(state)

    def from_arrays(self, arrays: Mapping[str, Any], params: Any) -> RemoteState:
        """Create a session with the state of a checkpoint, on the server of this transformation.

        An older session stays as it is.

        Args:
            arrays: the arrays that `to_arrays` returned, here or in another process; also arrays of JAX's.
            params: the parameters of the program, as for `init`: the new session has their values. Where a parameter
                of fewer bits is the rounding of the checkpoint's float32 value, the session has the latter.

        Returns:
            The state at the checkpoint's step.

        Raises:
            InvalidRequestError: the arrays are those of other tensors or another rule, or traced.
            StepwireError: as `Client.create_session`.
        """
        return self._operations.from_arrays(arrays, params)

    def session(self, state: RemoteState) -> Session:
        """Return the session of a state, for `state()`, `last_result`, `pull(average=True)` and the like.

        Use `update` alone for steps: the state does not count other steps.

        Raises:
            InvalidRequestError: the session was closed, or the state comes from another process and was not used in
                this one.
        """
        return self._operations.session(state)

    def close(self, state: RemoteState) -> None:
        """Close the session, and its connection if no other session uses it. Closing twice is harmless."""
        self._operations.close(state)


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
        A transformation with updates that are the server's new parameters minus `params`. Each step starts from the
        `params` that it gets: the server's parameters follow changes by other code.

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
    made = Operations(optimizer, learning_rate, connection, session_options, groups)
    new = RemoteTransformation(made.init, made.update)
    new._operations = made
    return new


def undecayed(mask: Any, field: str) -> Groups | None:
    """Return the groups of a weight decay's mask: the tensors outside the mask are a group without decay."""
    if mask is None or mask is True:
        return None

    def groups(params: Any) -> list[dict[str, Any]]:
        left_out = [name for name, decays in bools_by_name(mask, params, field).items() if not decays]
        return [{"params": left_out, "weight_decay": 0.0}] if left_out else []

    return groups


def _own_rate(optimizer: Optimizer, learning_rate: LearningRate) -> Any:
    """Return the session's own learning rate: 0 if each step sends one, so that a step without one changes nothing."""
    if learning_rate is None:
        return optimizer.hyperparameters().lr
    return 0.0 if changes(learning_rate) else learning_rate
