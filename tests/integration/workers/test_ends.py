"""Servers that end, and workers that are stopped, while a round is open."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from tests.integration.processes import ServerProcess
from tests.integration.workers.together import together

pytestmark = pytest.mark.slow

SIZE = 1_000_000
ONES = {"w": np.ones(SIZE, np.float32)}
WORKER = """
import sys, numpy as np, stepwire
from tests.integration.workers.test_ends import ONES, options
session = stepwire.connect(sys.argv[1], transport="tcp").create_session(ONES, worker=2, **options(sys.argv[2]))
while True:
    session.step(ONES)
"""


@pytest.fixture
def process() -> Iterator[ServerProcess]:
    with ServerProcess() as process:
        yield process


def options(request_id: str) -> dict[str, Any]:
    """Return the options of a session whose rounds go on with two of three workers, and that receives one at a time."""
    together_ = stepwire.Aggregation(workers=3, required_workers=2, most_grace=0.5, uploads_at_once=1)
    return {"optimizer": stepwire.SGD(lr=1.0), "aggregation": together_, "request_id": request_id}


def joined(process: ServerProcess, worker: int, request_id: str) -> Any:
    client = stepwire.connect(process.target, transport="tcp", timeout=60.0)
    session = client.create_session(ONES, worker=worker, **options(request_id))
    session.attach()
    return session


def test_a_server_that_ends_keeps_nobody_waiting(process: ServerProcess) -> None:
    session = joined(process, 0, uuid.uuid4().hex)
    waiting = session.step_async(ONES, timeout=2.0)
    while not session.info().members[0].attached:
        pass
    process.signal(signal.SIGTERM)
    assert process.exit_code() == 0
    with pytest.raises((stepwire.UnavailableError, stepwire.DeadlineExceededError)):
        waiting.result(60.0)


def test_rounds_go_on_without_a_worker_that_is_stopped_wherever_it_is(process: ServerProcess) -> None:
    request_id = uuid.uuid4().hex
    sessions = [joined(process, worker, request_id) for worker in range(2)]
    stopped = subprocess.Popen([sys.executable, "-c", WORKER, process.target, request_id])
    try:
        for _ in range(3):
            while not {each.worker: each.contribution for each in sessions[0].info().members}.get(2):  # until it comes
                together(*(functools.partial(session.step, ONES) for session in sessions))
            os.kill(stopped.pid, signal.SIGSTOP)
            for _ in range(3):
                found = together(*(functools.partial(session.step, ONES) for session in sessions))
            assert found[0]["w"].tobytes() == found[1]["w"].tobytes()
            os.kill(stopped.pid, signal.SIGCONT)
    finally:
        stopped.kill()
        stopped.wait()
