"""The state of a session as of one moment."""

from __future__ import annotations

from typing import NamedTuple

from stepwire_server.rules.loss_scale import LossScale

__all__ = ["Snapshot"]


class Snapshot(NamedTuple):
    """One moment of a session.

    Attributes:
        step: its last committed step.
        load: its last committed load.
        tensor_steps: updates each tensor has had (Adam's t), in layout order.
        loss_scale: where loss scaling stands; None without it.
        tensor_scalars: the scalar that the rule keeps for each tensor, in layout order; empty where it keeps none.
    """

    step: int
    load: int
    tensor_steps: tuple[int, ...]
    loss_scale: LossScale | None
    tensor_scalars: tuple[float, ...] = ()
