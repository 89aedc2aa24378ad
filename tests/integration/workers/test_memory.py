"""The server's memory for several workers does not grow with their number."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stepwire
from tests.integration.processes import ServerProcess
from tests.integration.workers.together import together

pytestmark = pytest.mark.slow

SIZE, ROUNDS, UPLOADS = 2_000_000, 2, 2
STATE_BYTES, SUM_BYTES, WIRE_BYTES = 12 * SIZE, 17 * SIZE // 2, 2 * SIZE
SLACK_BYTES = 64 << 20


def resident_bytes(pid: int, *, peak: bool) -> int:
    """Return the resident memory of a process: as it is, or the most since `forget_peak`."""
    name = "VmHWM:" if peak else "VmRSS:"
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no {name}")


def forget_peak(pid: int) -> None:
    """Count the peak of a process from now on."""
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")


def joined(stack: contextlib.ExitStack, target: str, workers: int, size: int) -> list[Any]:
    shared: dict[str, Any] = {
        "optimizer": stepwire.Adam(lr=0.1),
        "aggregation": stepwire.Aggregation(workers=workers, uploads_at_once=UPLOADS),
        "request_id": f"memory-{workers}-{size}",
        "gradient_dtype": "bfloat16",
        "reply_dtype": "bfloat16",
    }
    zeros, sessions = {"w": np.zeros(size, np.float32)}, []
    for worker in range(workers):
        client = stack.enter_context(stepwire.connect(target, transport="tcp", timeout=120.0))
        sessions.append(client.create_session(zeros, worker=worker, **shared))
    return sessions


def step(sessions: list[Any], gradient: dict[str, Any]) -> None:
    """Take a step together; nobody keeps the replies."""

    def one(session: Any) -> None:
        session.step(gradient)

    together(*(functools.partial(one, session) for session in sessions))


# The gradients wait on the clients. What is left is about 1.4 MB a worker: its connection, its thread and the replies
# that stand in its window.
keeps_connections = pytest.mark.xfail(raises=AssertionError, strict=True, reason="every connection has its own memory")


@pytest.mark.parametrize("workers", [2, 8, pytest.param(64, marks=[keeps_connections, pytest.mark.long])])
def test_the_peak_of_the_server_does_not_grow_with_the_workers(workers: int) -> None:
    draw = np.random.default_rng(1)
    gradient = {"w": draw.standard_normal(SIZE, np.float32).astype(ml_dtypes.bfloat16)}
    with ServerProcess() as process, contextlib.ExitStack() as stack:
        step(joined(stack, process.target, 2, 1000), {"w": gradient["w"][:1000]})  # kernels are compiled
        rest = resident_bytes(process.pid, peak=False)
        forget_peak(process.pid)
        sessions = joined(stack, process.target, workers, SIZE)
        for _ in range(ROUNDS):
            step(sessions, gradient)
        assert sessions[0].last_result.round.members == workers
        taken = resident_bytes(process.pid, peak=True) - rest
        assert taken <= STATE_BYTES + SUM_BYTES + UPLOADS * WIRE_BYTES + SLACK_BYTES, taken
