"""The state of a session that follows another one: what stays, what was written, and what begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepwire.errors import InvalidRequestError, StepMismatchError
from stepwire.session import Session
from stepwire.torch.live_state import LiveState
from stepwire.torch.mirror import ExtraState, Wanted
from stepwire.torch.parameters import Parameters
from stepwire.torch.states import SnapshotView

__all__ = ["edited", "last_step", "loaded", "regrouped"]

Edits = Mapping[Any, dict[str, Any]]
"""The written state of parameters, by parameter."""


def last_step(session: Session) -> int:
    """Return the number that a state goes on from, also if some of several servers have applied another step."""
    try:
        return session.applied_step
    except StepMismatchError:
        return max(shard.applied_step for shard in session.shards)


def edited(parameters: Parameters, edits: Edits, view: SnapshotView | None, step: int) -> Wanted:
    """Return the state of a session some of whose parameters have another state now.

    Args:
        parameters: the parameters of the session.
        edits: the written state.
        view: the state of the session; None if no parameter keeps its state.
        step: the step number to go on from.
    """
    names = {tensor.name: tensor.name for tensor in parameters.tensors}
    entries = {tensor.name: edits[tensor.parameter] for tensor in parameters.tensors if tensor.parameter in edits}
    return Wanted(entries, None if view is None else view.snapshot, names, step)


def regrouped(before: Parameters, parameters: Parameters, live: LiveState, view: SnapshotView, step: int) -> Wanted:
    """Return the state of a session of other parameters, or of parameters in other groups, shapes or dtypes.

    Args:
        before: the parameters of the session before.
        parameters: the parameters of the new session.
        live: the state that users see, with what they have written.
        view: the state of the session before.
        step: the step number to go on from.

    Raises:
        InvalidRequestError: a parameter has another shape, and its state has not.
    """
    edits, olds = live.edits(), _shared(before, parameters)
    had = {id(tensor.parameter) for tensor in before.tensors}
    entries: dict[str, Mapping[str, Any]] = {}
    for tensor in parameters.tensors:
        parameter, name = tensor.parameter, tensor.name
        if parameter in edits:
            entries[name] = edits[parameter]
        elif id(parameter) not in had:
            entries[name] = live.claimed(parameter)
        elif name not in olds and view.keys(parameter):
            raise InvalidRequestError.of(
                f"params[{name!r}]",
                f"the parameter has another shape now, {tensor.shape}, and its state has not; drop the state with "
                "`del optimizer.state[parameter]`, or put tensors of the new shape there",
            )
        elif name not in olds:
            entries[name] = {}
    return Wanted(entries, view.snapshot, olds, step)


def loaded(
    before: Parameters,
    parameters: Parameters,
    entries: Sequence[Mapping[str, Any]],
    extra: ExtraState,
    view: SnapshotView | None,
    step: int,
) -> Wanted:
    """Return the state of a session into which a state dict is loaded.

    Args:
        before: the parameters of the session before.
        parameters: the parameters of the session, perhaps the same.
        entries: torch's state of each parameter, in order.
        extra: the state beyond torch's.
        view: the state of the session before, for its masters; None to have them of the session itself.
        step: the step number to go on from.
    """
    named = {tensor.name: entry for tensor, entry in zip(parameters.tensors, entries, strict=True)}
    olds = {} if view is None else _shared(before, parameters)
    return Wanted(named, None if view is None else view.snapshot, olds, step, extra)


def _shared(before: Parameters, parameters: Parameters) -> dict[str, str]:
    """Return the names before of the parameters that both have in the same shape, by their present names."""
    olds = {id(tensor.parameter): tensor for tensor in before.tensors}
    found = [(tensor, olds.get(id(tensor.parameter))) for tensor in parameters.tensors]
    return {tensor.name: old.name for tensor, old in found if old is not None and old.shape == tensor.shape}
