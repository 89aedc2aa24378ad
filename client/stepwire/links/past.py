"""The past of a link to a session, for its successor: the link to the place that the session has moved to."""

from __future__ import annotations

import threading
from typing import NamedTuple

from stepwire.steps.carry import Carry
from stepwire.steps.doubt import Doubt, UntoldSteps
from stepwire.v1 import step_pb2

__all__ = ["LinkPast"]


class LinkPast(NamedTuple):
    """The past of a link.

    Attributes:
        lock: the lock that serialises the session's steps and loads.
        carry: the arrays that outlive a step.
        last_result: the result of the last step; None before the first.
        doubt: the step whose outcome is unknown; None without one.
        untold: the steps whose outcome nobody can tell.
        load: the load that the doubt belongs to; None where shards had several.
    """

    lock: threading.RLock
    carry: Carry
    last_result: step_pb2.StepResult | None
    doubt: Doubt | None
    untold: UntoldSteps
    load: int | None
