"""The things that the client carries from one step to the next."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from stepwire.steps.call import StepCall
from stepwire.steps.carry import Carry
from stepwire.v1 import aggregation_pb2, session_pb2, step_pb2, tensor_pb2
from stepwire.wire.dtypes import FLOAT32

DROPPED = step_pb2.StepResult(step=1, round=aggregation_pb2.RoundResult(contribution=1, dropped=True))


@pytest.mark.parametrize(
    ("result", "residual"),
    [(step_pb2.StepResult(step=1), 0.25), (step_pb2.StepResult(step=1, skipped=True), 0.0), (DROPPED, 0.0)],
)
def test_the_error_of_a_gradient_that_was_not_applied_is_not_carried(
    result: step_pb2.StepResult, residual: float
) -> None:
    config = session_pb2.SessionConfig(gradient_dtype=tensor_pb2.DTYPE_INT8_BLOCKWISE)
    carry = Carry(session_pb2.Session(config=config), 4, error_feedback=True)
    assert carry.feedback is not None
    call = dataclasses.replace(
        StepCall(step_pb2.StepBegin(step=1), [], np.dtype(FLOAT32), [], np.dtype(FLOAT32)), feedback=carry.feedback
    )
    carry.feedback.begin().keep(0, np.full(4, 1.25, np.float32), np.ones(4, np.float32))
    carry.applied(call, result)
    assert carry.feedback.residual.tolist() == [residual] * 4
