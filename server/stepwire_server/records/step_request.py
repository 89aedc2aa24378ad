"""A step as its first message asks for it, in the domain's own terms."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stepwire.optimizers import Hyperparameters

__all__ = ["Decision", "StepRequest"]


class Decision(NamedTuple):
    """The decision of a coordinator about a gradient that is cut over several sessions.

    Attributes:
        coefficient: the factor of clipping by the global norm.
        groups: the factor of each group's own clipping; empty where groups are not clipped.
        skip: use up the step's number without an update.
    """

    coefficient: float = 1.0
    groups: tuple[float, ...] = ()
    skip: bool = False


class StepRequest(NamedTuple):
    """One step as its first message asks for it.

    Attributes:
        step: the number it will have once applied.
        epoch: the epoch the client knows; 0 skips the check.
        gradient_dtype: encoding of the chunks that follow.
        reply_dtype: encoding of the reply.
        reply: parameters go back.
        reply_elements: most elements in a chunk of the reply.
        groups: the hyper-parameters of each group in this step.
        own_lr: for each group, the step brought its learning rate, and the schedule's is not used; empty for none.
        load: the last load the client knows; None skips the check.
        loss_scale: the factor that the client multiplied the gradient by.
        missing: indices of tensors without a gradient.
        reply_first: indices of tensors whose parameters go back before the others, in this order.
        reply_base: the step whose parameters the client holds, where only changes go back; else None.
        overlap: apply chunks as they arrive.
        shared: gradient and reply lie in the memory that the stream shares.
        decision: of the coordinator, once it is known; None where there is none.
        base_step: the step whose parameters the gradient is of; None for the present one. With aggregation alone.
        weight: the weight of the gradient among those of other workers.
        lr_factor: the factor of the learning rates, scheduled ones too.
        awaits_admission: the opening came alone, and the rest follows its admission.
        tables: the index of each table that has a gradient, with the number of its rows.
        reply_rows: the rows of tables go back too.
        opening: the message itself, without its number and what concerns the reply, for a log; else empty.
    """

    step: int
    epoch: int
    gradient_dtype: np.dtype[Any]
    reply_dtype: np.dtype[Any]
    reply: bool
    reply_elements: int
    groups: tuple[Hyperparameters, ...]
    own_lr: tuple[bool, ...] = ()
    load: int | None = None
    loss_scale: float = 1.0
    missing: frozenset[int] = frozenset()
    reply_first: tuple[int, ...] = ()
    reply_base: int | None = None
    overlap: bool = False
    shared: bool = False
    decision: Decision | None = None
    base_step: int | None = None
    weight: float = 1.0
    lr_factor: float = 1.0
    awaits_admission: bool = False
    tables: tuple[tuple[int, int], ...] = ()
    reply_rows: bool = False
    opening: bytes = b""

    @property
    def replies_rows(self) -> bool:
        """Tell whether rows of tables go back."""
        return self.reply and self.reply_rows

    def numbered(self, step: int) -> StepRequest:
        """Return the same request for another step; a third of what `_replace` costs."""
        return StepRequest(step, *self[1:])
