"""Runs one case on a server and returns its result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import grpc
import numpy as np

from conformance.judging import Miss, parameter_misses, state_misses, telemetry_misses
from conformance.remote_session import NotServedError, RemoteSession
from conformance.stored_case import StoredCase, Tensors
from stepwire.v1 import step_pb2

__all__ = ["FAILED", "NOT_SERVED", "PASSED", "CaseResult", "check"]

PASSED, FAILED, NOT_SERVED = "passed", "FAILED", "not served"


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """The result of a case.

    Attributes:
        case: the name of the case.
        rule: the rule of the case, without prefix.
        outcome: one of PASSED, FAILED and NOT_SERVED.
        ulps: the worst error of an update at the first checkpoints, in ulps of the update.
        relative: the worst error of a later parameter, by its tensor's scale.
        fraction: the worst error of parameters, state and telemetry as a fraction of its bound; at most 1 when passed.
        detail: the number with the worst error, or the feature that is not served.
    """

    case: str
    rule: str
    outcome: str
    ulps: float = 0.0
    relative: float = 0.0
    fraction: float = 0.0
    detail: str = ""


def check(
    channel: grpc.Channel, case: StoredCase, last_step: int | None = None, *, always_reply: bool = False
) -> CaseResult:
    """Run a case up to its last checkpoint, or up to `last_step` if that comes before.

    Args:
        channel: the channel to the server.
        case: the case.
        last_step: the last step to run; later checkpoints are omitted.
        always_reply: every step is answered with the parameters, not the steps of checkpoints alone.

    Returns:
        The result of the case.
    """
    try:
        misses = list(_misses(channel, case, last_step, always_reply))
    except NotServedError as error:
        return CaseResult(case.name, case.rule, NOT_SERVED, detail=str(error))
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        return CaseResult(
            case.name, case.rule, FAILED, fraction=math.inf, detail=f"{error.code().name}: {error.details()}"
        )
    worst = max(misses, key=lambda miss: miss.fraction)
    parameters = [miss for miss in misses if miss.of_parameters]
    return CaseResult(
        case.name,
        case.rule,
        PASSED if worst.fraction <= 1 else FAILED,
        ulps=max((miss.ulps for miss in parameters), default=0.0),
        relative=max((miss.relative for miss in parameters), default=0.0),
        fraction=worst.fraction,
        detail=worst.label,
    )


def _misses(channel: grpc.Channel, case: StoredCase, last_step: int | None, always_reply: bool) -> Iterator[Miss]:
    checkpoints = [step for step in case.checkpoints if last_step is None or step <= last_step]
    with RemoteSession(channel, case) as session:
        for slot in case.slots:
            if slot not in session.slots:
                yield Miss(f"the server keeps no slot {slot!r}, only {session.slots}", math.inf)
                return
        for number in range(1, max(checkpoints) + 1):
            result, parameters = session.step(number, reply=always_reply or number in checkpoints)
            yield from _flag_misses(case, result)
            if number in checkpoints:
                yield from _checkpoint_misses(session, case, number, result, parameters)


def _flag_misses(case: StoredCase, result: step_pb2.StepResult) -> Iterator[Miss]:
    """Check the flags of a result."""
    every = max(1, case.config.gradient.accumulation_steps)
    summed = range(result.step - every + 1, result.step + 1)
    accumulated = result.step % every != 0
    expected = {
        "replayed": False,
        "skipped": not accumulated and any(case.special(step).first_element is not None for step in summed),
        "accumulated": accumulated,
    }
    for flag, value in expected.items():
        if getattr(result, flag) != value:
            yield Miss(f"{flag} of step {result.step} is {not value}", math.inf)


def _checkpoint_misses(
    session: RemoteSession, case: StoredCase, number: int, result: step_pb2.StepResult, parameters: Tensors
) -> Iterator[Miss]:
    index = case.checkpoints.index(number)
    states, counts = session.pull(["param", *case.slots])
    yield from parameter_misses(case, index, parameters)
    for slot in case.slots:
        yield from state_misses(case, index, slot, states[slot])
    for name, values in states["param"].items():
        if not np.array_equal(values, parameters[name]):
            yield Miss(f"{name} pulled after step {number} differs from the reply of the step", math.inf)
    for name, count in case.tensor_steps(number).items():
        if counts[name] != count:
            yield Miss(f"{name} has had {counts[name]} updates after step {number}, expected {count}", math.inf)
    yield from telemetry_misses(case, number, result.telemetry)
