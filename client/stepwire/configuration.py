"""What a session was created as, read back from its server."""

from __future__ import annotations

import dataclasses
from typing import Any

from stepwire.optimizers import Hyperparameters, Optimizer
from stepwire.treatment import GradientTreatment, treatment_from_wire
from stepwire.v1 import session_pb2
from stepwire.wire import hyperparameters_from_wire, optimizer_from_wire

__all__ = ["PRECISIONS", "Configuration"]

PRECISIONS = {
    "float32": session_pb2.STATE_PRECISION_FLOAT32,
    "bfloat16": session_pb2.STATE_PRECISION_BFLOAT16_MOMENTS,
    "int8": session_pb2.STATE_PRECISION_INT8_MOMENTS,
}
"""The contract's values of what `create_session` calls `state_precision`."""


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What a session runs.

    Attributes:
        optimizer: the rule, with the numbers of groups that have none of their own.
        groups: the numbers of each group.
        membership: the group of each tensor, by name.
        treatment: what happens to gradients first.
        state_precision: how moments are held, as `create_session` calls it.
    """

    optimizer: Optimizer
    groups: tuple[Hyperparameters, ...]
    membership: dict[str, int]
    treatment: GradientTreatment
    state_precision: str

    @classmethod
    def from_wire(cls, message: session_pb2.SessionConfig) -> Configuration:
        """Decode a session's config."""
        names = {value: name for name, value in PRECISIONS.items()}
        return cls(
            optimizer=optimizer_from_wire(message.optimizer, "optimizer"),
            groups=tuple(hyperparameters_from_wire(group.overrides) for group in message.groups),
            membership={tensor.name: tensor.group for tensor in message.tensors},
            treatment=treatment_from_wire(
                message.gradient,
                "gradient",
                group_clips=any(group.HasField("clip_grad_norm") for group in message.groups),
            ),
            state_precision=names.get(message.state_precision, "float32"),
        )

    def arguments(self, group: int) -> dict[str, Any]:
        """Return a group's numbers by the names of the optimizer's constructor."""
        return self.optimizer.arguments(self.groups[group])
