"""A log line a commit, at level debug and not above."""

from __future__ import annotations

import json
from typing import Any

import pytest
from structlog.testing import capture_logs

from stepwire.wire.dtypes import FLOAT32
from stepwire_server.observability.commits import log_committed
from stepwire_server.observability.logs import configure_logging
from stepwire_server.records.committed import Committed
from stepwire_server.records.step_request import StepRequest
from stepwire_server.records.step_result import StepResult, StepTimes

ID = "ab" * 16
COMMITTED = Committed(
    session_id=ID,
    worker=0,
    load=2,
    request=StepRequest(7, 1, FLOAT32, FLOAT32, True, 1 << 20, ()),
    result=StepResult(7, 1, False, 1.5, 0, (), StepTimes(0.5, 0.25, 0.125)),
)


def test_a_commit_is_logged_with_its_numbers() -> None:
    with capture_logs() as logged:
        log_committed(COMMITTED)
        log_committed(COMMITTED._replace(result=COMMITTED.result._replace(step=8, skipped=True)))
    numbers = {"session_id": ID, "worker": 0, "load": 2, "grad_norm": 1.5, "apply_seconds": 0.125}
    assert logged == [
        {"event": "committed", "log_level": "debug", "step": 7, "skipped": False} | numbers,
        {"event": "committed", "log_level": "debug", "step": 8, "skipped": True} | numbers,
    ]


@pytest.mark.usefixtures("logging_as_it_was")
@pytest.mark.parametrize(("level", "lines"), [("debug", 1), ("info", 0)])
def test_a_server_that_logs_at_debug_prints_it(capsys: Any, level: str, lines: int) -> None:
    configure_logging(level, as_json=True)
    log_committed(COMMITTED)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["event"], line["level"], line["step"]) for line in printed] == [("committed", "debug", 7)] * lines
