"""The whole of a sharded session, as one server would describe it."""

from __future__ import annotations

from collections.abc import Sequence

from stepwire.errors import InvalidRequestError
from stepwire.layout import Layout
from stepwire.optimizers.gradient_treatment import treatment_from_wire
from stepwire.sharding.coordinator import Bounds
from stepwire.v1 import session_pb2
from stepwire.wire.messages import layout_to_wire, spec_to_wire

__all__ = ["bounds_of", "check_alike", "whole_session"]


def whole_session(messages: Sequence[session_pb2.Session], layout: Layout) -> session_pb2.Session:
    """Return the session that one server would have for the whole; its id is those of the shards, joined by commas."""
    whole = session_pb2.Session()
    whole.CopyFrom(messages[0])
    whole.session_id = ",".join(message.session_id for message in messages)
    whole.epoch = 0  # each shard has its own
    del whole.config.tensors[:]
    specs = {tensor.spec.name: tensor.spec for tensor in layout.tensors}
    whole.config.tensors.extend(spec_to_wire(specs[name]) for name in layout.names)
    slots = max((message.layout.slots for message in messages), key=len)  # a shard of tables alone may have fewer
    whole.layout.CopyFrom(layout_to_wire(layout, tuple(slots)))
    return whole


def bounds_of(whole: session_pb2.Session) -> Bounds | None:
    """Return the bounds that the gradient is checked against; None if each shard decides by itself."""
    gradient, groups = whole.config.gradient, whole.config.groups
    if not gradient.two_phase:
        return None
    bounds = tuple(group.clip_grad_norm if group.HasField("clip_grad_norm") else None for group in groups)
    treatment = treatment_from_wire(gradient, "gradient", group_clips=any(bounds))
    return Bounds(treatment.clip_grad_norm, bounds, treatment.clip_formula or "torch", treatment.policy)


def check_alike(messages: Sequence[session_pb2.Session]) -> None:
    """Refuse sessions that differ in more than their tensors, and in the slots that these have.

    Raises:
        InvalidRequestError: names the first session that differs.
    """
    configs = []
    for message in messages:
        config = session_pb2.SessionConfig()
        config.CopyFrom(message.config)
        for field in ("tensors", "device", "lease", "label"):
            config.ClearField(field)
        configs.append(config)
    for message, config in zip(messages, configs, strict=True):
        if config != configs[0]:
            raise InvalidRequestError.of(
                "session_id",
                f"{message.session_id!r} has another optimizer, other groups or other options than "
                f"{messages[0].session_id!r}; they are not the shards of one model",
            )
