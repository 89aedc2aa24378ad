"""A contribution whose outcome is unknown, and which may be in a round that is not over."""

from __future__ import annotations

import numpy as np

from stepwire.connection.retry import Deadline
from stepwire.errors import InvalidRequestError, NotEnoughWorkersError, StateChangedError
from stepwire.links.hold import Hold
from stepwire.steps.call import Decide, StepCall
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire.wire.dtypes import FLOAT32

__all__ = ["await_open_round"]


def await_open_round(hold: Hold, step: int, decide: Decide | None, deadline: Deadline) -> bool:
    """Wait for the end of the round that has a contribution, and tell whether one has; as `hold.step_on_server` does.

    `decide` decides a round of two phases.

    A contribution counts at its commit, and is answered later. So it is asked for by its number, without a gradient: a
    server that has it answers with its round, and any other one refuses.

    Raises:
        StepwireError: as `Hold.step`; the outcome is as unknown as before.
    """
    hold.attach(deadline)
    if not hold.has_rounds or hold.step_on_server == step:
        return hold.step_on_server == step
    base, begin = hold.base_step, step_pb2.StepBegin(step=step)
    begin.reply.mode = step_pb2.REPLY_MODE_NONE
    question = pb.AttachRequest(begin=begin, commit=step_pb2.StepCommit()).SerializeToString()
    call = StepCall(begin, [], np.dtype(FLOAT32), [], np.dtype(FLOAT32), recorded=(question,), sent=True)
    call.decide = decide
    try:
        hold.step(call, deadline)
    except (InvalidRequestError, NotEnoughWorkersError, StateChangedError):  # no round has it, or has it any more
        hold.attach(deadline)
    else:
        hold.base_step = base  # the next gradient is of the parameters before
    return hold.step_on_server == step
