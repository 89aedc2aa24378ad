"""Snapshots: the load that restores one, and the snapshot of pulled state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy.typing as npt

from stepwire.errors import InvalidRequestError
from stepwire.links.link import Load
from stepwire.optimizers.arguments import checked_instance
from stepwire.results import Snapshot
from stepwire.steps.description import SessionDescription
from stepwire.v1 import state_pb2

__all__ = ["load_of", "snapshot_of"]

_T = TypeVar("_T")


def load_of(state: Snapshot, description: SessionDescription) -> Load:
    """Return the load that replaces the state of a session by a snapshot.

    Raises:
        InvalidRequestError: slots, names, shapes or dtypes do not fit the session.
    """
    checked_instance(state, Snapshot, "state", "give what Session.state() returns; Session.load takes parameters")
    slots, packer = description.slots, description.packer
    if set(state.slots) != set(slots):
        raise InvalidRequestError.of("state.slots", f"has {sorted(state.slots)}, the session has {sorted(slots)}")
    sources = {slot: packer.ordered(state.slots[slot], f"state.slots[{slot!r}]") for slot in slots}
    names = [tensor.spec.name for tensor in packer.layout.tensors]
    steps = [_entry(state.tensor_steps, name, "state.tensor_steps") for name in names]
    scalars = [_entry(state.tensor_scalars, name, "state.tensor_scalars") for name in names if state.tensor_scalars]
    return Load(sources, state.step, steps, state.loss_scale, scalars, whole=True)


def _entry(values: Mapping[str, _T], name: str, field: str) -> _T:
    if name not in values:
        raise InvalidRequestError.of(field, f"{name!r} is missing")
    return values[name]


def snapshot_of(
    header: state_pb2.PullHeader, slots: Mapping[str, dict[str, npt.NDArray[Any]]], description: SessionDescription
) -> Snapshot:
    """Return the snapshot of pulled state.

    Args:
        header: the moment of the pull.
        slots: by slot, the arrays by name.
        description: the session.
    """
    packer = description.packer
    names = [tensor.spec.name for tensor in packer.layout.tensors]
    scale = header.loss_scale
    return Snapshot(
        step=header.step,
        slots=dict(slots),
        tensor_steps=packer.in_order(dict(zip(names, header.tensor_steps, strict=True))),
        loss_scale=(scale.scale, scale.clean_steps) if header.HasField("loss_scale") else None,
        tensor_scalars=dict(zip(names, header.tensor_scalars, strict=True)) if header.tensor_scalars else {},
    )
