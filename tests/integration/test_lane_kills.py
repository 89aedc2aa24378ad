"""A server that dies or stops at a message of a step that its compiled lane makes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.errors import DeadlineExceededError, StepwireError
from stepwire.transports.packets import PacketLane

pytestmark = pytest.mark.many

pytest.importorskip("numba")

SERVER = """
import sys
from stepwire_server.config import ServerConfig
from stepwire_server.server import Server
from tests.support.lane_wire import steps_in_lanes, wait_for_loops

with Server(ServerConfig(bind="127.0.0.1:0", device="cpu", threads=1, sweep_seconds=3600.0)) as server:
    server.lanes.after_steps = server.lanes.steps_alike = 1
    print(">", server.target, flush=True)
    for line in sys.stdin:
        wait_for_loops(server)
        print(">", steps_in_lanes(server), flush=True)
"""
STEPS = 6
PATIENCE_SECONDS = 120.0


class LaneServer:
    """A server in a process of its own. A context manager; killed at the end."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.target = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(">"):  # others are of the log
                return line[1:].strip()
        raise AssertionError("the server has ended")

    def stop(self) -> None:
        """Have the process stand still, and wait until all its threads do."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def steps_in_lanes(self) -> int:
        """Wait for the loops that are being compiled, and count the steps that loops have made."""
        print(file=self.process.stdin, flush=True)
        return int(self._line())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)

    def __enter__(self) -> LaneServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.process.communicate()


@pytest.fixture
def server() -> Iterator[LaneServer]:
    with LaneServer() as server:
        yield server


@pytest.fixture
def session(server: LaneServer) -> Iterator[stepwire.Session]:
    """A session of SGD with rate 1, some steps of ones old; a loop makes its next step. It repeats no call.

    The next attempt would come after every deadline.
    """
    retry = stepwire.Retry(uniform=lambda low, high: 3600.0)
    with stepwire.connect(server.target, transport="packets", timeout=PATIENCE_SECONDS, retry=retry) as client:
        session = client.create_session({"w": np.zeros(3, np.float32)}, optimizer=stepwire.SGD(lr=1.0))
        for step in range(STEPS):
            step_of(session, 1.0)
            if step == 2:
                server.steps_in_lanes()
        assert server.steps_in_lanes() > 0
        step_of(session, 0.0)
        yield session
        session.keep()


def step_of(session: stepwire.Session, value: float, **options: Any) -> float:
    reply: Any = session.step({"w": np.full(3, value, np.float32)}, **options)
    return float(reply["w"][0])


@pytest.mark.long
def test_a_server_killed_between_two_steps_fails_the_next_one(server: LaneServer, session: stepwire.Session) -> None:
    server.kill()
    with pytest.raises(StepwireError):
        step_of(session, 2.0)


@pytest.mark.parametrize("replied", [False, True])
def test_a_server_killed_within_a_step_loses_its_reply_or_has_sent_it(
    server: LaneServer, session: stepwire.Session, monkeypatch: pytest.MonkeyPatch, replied: bool
) -> None:
    receive = PacketLane.receive

    def kill_first(lane: PacketLane, seconds: float) -> bytes | None:
        monkeypatch.setattr(PacketLane, "receive", receive)
        if replied:
            assert select.select([lane._end], [], [], PATIENCE_SECONDS)[0]
        server.kill()
        return receive(lane, seconds)

    monkeypatch.setattr(PacketLane, "receive", kill_first)
    if replied:
        assert step_of(session, 2.0) == -STEPS - 2.0
        with pytest.raises(StepwireError):
            step_of(session, 2.0)
        return
    server.stop()
    with pytest.raises(StepwireError):
        step_of(session, 2.0)
    assert session.statistics().step_in_doubt == session.applied_step + 1


def test_a_step_that_a_stopped_server_keeps_waiting_counts_once(server: LaneServer, session: stepwire.Session) -> None:
    server.stop()
    with pytest.raises(DeadlineExceededError):
        step_of(session, 2.0, timeout=0.2)
    server.process.send_signal(signal.SIGCONT)
    assert step_of(session, 2.0) == -STEPS - 2.0
    assert step_of(session, 2.0) == -STEPS - 4.0
    assert session.info().applied_step == session.applied_step == STEPS + 3
