"""Counts of each thread, added up: nothing is lost when threads end, and nothing is counted twice."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from stepwire.wire.dtypes import FLOAT32
from stepwire_server.observability.tallies import STAGES, Tallies
from stepwire_server.records.committed import Committed
from stepwire_server.records.replied import Replied
from stepwire_server.records.round_result import RoundResult
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult, StepTimes

TIMES = StepTimes(receive=0.5, queue=0.25, apply=0.125, reduce=0.0)
REQUEST = StepRequest(7, 1, FLOAT32, FLOAT32, True, 100, ())


def result_of(**fields: Any) -> StepResult:
    plain: dict[str, Any] = {"step": 7, "epoch": 1, "skipped": False, "grad_norm": 1.5, "non_finite_count": 0}
    return StepResult(**plain | {"groups": (), "times": TIMES} | fields)


def committed(**fields: Any) -> Committed:
    return Committed("ab" * 16, 0, 1, REQUEST, result_of(**fields), "shm")


def replied(**fields: Any) -> Replied:
    bfloat16 = np.dtype(np.float16)
    return Replied(
        "tcp",
        result_of(**fields),
        bfloat16,
        FLOAT32,
        20,
        48,
        sync_seconds=0.1,
        send_seconds=0.2,
        seconds=2.0,
        session_id="ab" * 16,
    )


def test_a_commit_has_an_outcome_and_its_stages() -> None:
    tallies = Tallies()
    for fields in ({}, {}, {"skipped": True}, {"accumulated": True}, {"times": TIMES._replace(reduce=4.0)}):
        tallies.committed(committed(**fields))
    total = tallies.total()
    assert total.steps == {("shm", "applied"): 3, ("shm", "skipped"): 1, ("shm", "accumulated"): 1}
    stages = dict(zip(STAGES, total.stages, strict=True))
    assert {name: (stage.count, stage.total) for name, stage in stages.items()} == {
        "receive": (5, 2.5),
        "queue": (5, 1.25),
        "reduce": (1, 4.0),
        "apply": (5, 0.625),
        "sync": (0, 0.0),
        "send": (0, 0.0),
    }


def test_a_reply_has_bytes_and_times_and_no_second_step() -> None:
    tallies = Tallies()
    tallies.replied(replied())
    tallies.replied(replied(replayed=True))
    tallies.replied(replied(round=RoundResult(3, dropped=True, waiting_seconds=0.75)))
    total = tallies.total()
    assert total.steps == {("tcp", "replayed"): 1, ("tcp", "dropped"): 1}
    assert total.moved == {
        ("received", "tcp", np.dtype(np.float16)): 60,
        ("sent", "tcp", FLOAT32): 144,
    }
    assert total.step_seconds["tcp"].total == 6.0
    assert [stage.total for stage in total.stages[-2:]] == pytest.approx([0.3, 0.6])
    assert (total.round_waits.count, total.round_waits.total) == (1, 0.75)


def test_threads_count_apart_and_are_added_up() -> None:
    tallies = Tallies()
    threads = [threading.Thread(target=tallies.committed, args=(committed(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tallies.committed(committed())
    assert tallies.total().steps == {("shm", "applied"): 5}
    assert tallies.total().steps == {("shm", "applied"): 5}, "those of ended threads are kept, once"
    assert tallies.total().stages[0].count == 5


def test_calls_and_refusals() -> None:
    tallies, method = Tallies(), ("unary", "stepwire.v1.OptimizerService", "Step")
    tallies.call_started(method)
    tallies.call_started(method)
    tallies.call_handled(method, "NotFound", 0.5)
    tallies.refused("SESSION_NOT_FOUND")
    total = tallies.total()
    assert total.started == {method: 2}
    assert total.handled == {(*method, "NotFound"): 1}
    assert total.handling[method].total == 0.5
    assert total.refusals == {"SESSION_NOT_FOUND": 1}
