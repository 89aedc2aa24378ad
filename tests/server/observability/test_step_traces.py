"""Spans of steps that were replied to: their stages, and the choice of the steps."""

from __future__ import annotations

from typing import Any

import pytest

from stepwire.tracing.spans import Span
from stepwire.wire.dtypes import FLOAT32
from stepwire.wire.trace_context import TraceContext
from stepwire_server.observability.digests import digest_in_logs
from stepwire_server.observability.step_traces import ReplyTraces
from stepwire_server.records.replied import Replied
from stepwire_server.records.round_result import RoundResult
from stepwire_server.records.step_result import StepResult, StepTimes

SESSION = "ab" * 16
CLIENT = TraceContext(5, 6, True)
TIMES = StepTimes(receive=0.5, queue=0.25, apply=0.125)
ROUND = RoundResult(contribution=3, members=2)
SECOND = 1_000_000_000


class Export:
    """Stands in for the way to the exporter, and makes the spans at once."""

    def __init__(self) -> None:
        self.steps: list[list[Span]] = []

    def put(self, spans: Any) -> None:
        self.steps.append(list(spans()))

    def close(self) -> None:
        pass


def replied(seconds: float = 2.0, trace: TraceContext | None = None, sync: float = 0.0, **fields: Any) -> Replied:
    plain = StepResult(step=7, epoch=1, skipped=False, grad_norm=1.5, non_finite_count=0, groups=(), times=TIMES)
    result = plain._replace(**fields)
    return Replied("tcp", result, FLOAT32, FLOAT32, 20, 48, sync, 0.5, seconds, SESSION, trace)


def traced(one: Replied) -> list[Span]:
    export = Export()
    ReplyTraces(export, 1).replied(one)  # type: ignore[arg-type]
    (spans,) = export.steps
    return spans


@pytest.mark.parametrize(
    ("one", "stages"),
    [
        (replied(), {"receive": (0.0, 0.5), "queue": (0.5, 0.75), "apply": (0.75, 0.875), "send": (1.5, 2.0)}),
        (
            replied(sync=0.25),
            {
                "receive": (0.0, 0.5),
                "queue": (0.5, 0.75),
                "apply": (0.75, 0.875),
                "sync": (0.875, 1.125),
                "send": (1.5, 2.0),
            },
        ),
        (
            # The round received for two seconds, the last half of one in this worker's own step.
            replied(round=ROUND, times=TIMES._replace(receive=2.0, reduce=0.5, queue=0.0)),
            {
                "receive": (0.0, 0.875),
                "queue": (0.875, 0.875),
                "reduce": (0.875, 1.375),
                "apply": (1.375, 1.5),
                "send": (1.5, 2.0),
            },
        ),
        (replied(replayed=True), {}),
        (replied(round=ROUND._replace(dropped=True)), {}),
    ],
    ids=["alone", "with a log", "in a round", "again", "too late"],
)
def test_stages_lie_in_their_step(one: Replied, stages: dict[str, tuple[float, float]]) -> None:
    step, *parts = traced(one)
    assert (step.name, step.kind, step.parent, step.context.sampled) == ("stepwire.step.server", "server", None, True)
    assert step.end_ns - step.start_ns == 2 * SECOND
    found = {
        part.name: ((part.start_ns - step.start_ns) / SECOND, (part.end_ns - step.start_ns) / SECOND) for part in parts
    }
    assert found == {f"stepwire.step.{name}": times for name, times in stages.items()}
    assert {part.parent for part in parts} <= {step.context}
    assert len({part.context.span_id for part in parts} | {step.context.span_id}) == len(stages) + 1


def test_a_span_names_its_session_as_the_log_does_and_what_became_of_the_step() -> None:
    step, *_ = traced(replied(skipped=True))
    assert dict(step.attributes) == {
        "stepwire.step": 7,
        "stepwire.session": digest_in_logs(SESSION),
        "stepwire.transport": "tcp",
        "stepwire.received_bytes": 20,
        "stepwire.sent_bytes": 48,
        "stepwire.skipped": True,
    }


def test_a_client_decides_for_its_steps_and_the_server_for_others_and_slow_ones() -> None:
    export = Export()
    traces = ReplyTraces(export, 1000)  # type: ignore[arg-type]
    traces.replied(replied(trace=CLIENT))
    traces.replied(replied(trace=CLIENT._replace(sampled=False)))
    (client_s,) = export.steps
    assert (client_s[0].parent, client_s[0].context.trace_id) == (CLIENT, CLIENT.trace_id)
    export.steps.clear()
    for _ in range(98):
        traces.replied(replied())
    assert len(export.steps) == 1  # the first of a thousand
    traces.replied(replied(seconds=2.5, trace=CLIENT._replace(sampled=False)))
    assert len(export.steps) == 2 and export.steps[1][0].parent == CLIENT._replace(sampled=False)
