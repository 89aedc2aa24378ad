"""What a session was created with, in the domain's own terms."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple

import numpy as np

from stepwire.layout import Layout
from stepwire.optimizers import Adam, Hyperparameters

__all__ = ["NonFinitePolicy", "SessionPlan", "StepOrder"]


class NonFinitePolicy(enum.Enum):
    """What to do with a gradient that holds NaN or Inf."""

    REJECT = "reject"
    SKIP = "skip"
    ALLOW = "allow"


@dataclasses.dataclass(frozen=True)
class SessionPlan:
    """A validated session configuration.

    Attributes:
        layout: where the tensors lie.
        optimizer: the formula and its structure.
        groups: the numbers of each group.
        non_finite: what to do with NaN and Inf.
        gradient_dtype: default encoding of gradients.
        reply_dtype: default encoding of answers.
        start_at_zero: parameters start as zeros instead of waiting for a load.
        lease_seconds: how long an unused session lives.
        label: for listings.
    """

    layout: Layout
    optimizer: Adam
    groups: tuple[Hyperparameters, ...]
    non_finite: NonFinitePolicy
    gradient_dtype: np.dtype[Any]
    reply_dtype: np.dtype[Any]
    start_at_zero: bool
    lease_seconds: float
    label: str


class StepOrder(NamedTuple):
    """What a client asks of one step.

    Attributes:
        step: the number it will have once applied.
        epoch: the epoch the client knows; 0 skips the check.
        gradient_dtype: encoding of the chunks that follow.
        reply_dtype: encoding of the answer.
        reply: whether parameters are wanted at all.
        reply_elements: most elements in a chunk of the answer.
        groups: the numbers of each group in this step.
    """

    step: int
    epoch: int
    gradient_dtype: np.dtype[Any]
    reply_dtype: np.dtype[Any]
    reply: bool
    reply_elements: int
    groups: tuple[Hyperparameters, ...]
