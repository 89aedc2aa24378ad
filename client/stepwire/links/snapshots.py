"""Snapshots: the load that restores one, and the snapshot of pulled state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from stepwire.errors import InvalidRequestError
from stepwire.links.link import Load
from stepwire.results import Snapshot
from stepwire.steps.description import SessionDescription
from stepwire.v1 import state_pb2

__all__ = ["load_of", "snapshot_of"]


def load_of(state: Snapshot, description: SessionDescription) -> Load:
    """Return the load that replaces the state of a session by a snapshot.

    Raises:
        InvalidRequestError: slots, names, shapes or dtypes do not fit the session.
    """
    slots, packer = description.slots, description.packer
    if set(state.slots) != set(slots):
        raise InvalidRequestError.of("state.slots", f"has {sorted(state.slots)}, the session has {sorted(slots)}")
    sources = {slot: packer.ordered(state.slots[slot], f"state.slots[{slot!r}]") for slot in slots}
    names = [tensor.spec.name for tensor in packer.layout.tensors]
    if missing := [name for name in names if name not in state.tensor_steps]:
        raise InvalidRequestError.of("state.tensor_steps", f"{missing[0]!r} is missing")
    return Load(sources, state.step, [state.tensor_steps[name] for name in names], state.loss_scale)


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
    )
