"""A drain: steps are admitted until it starts, counted, and waited for."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from stepwire.errors import Reason, UnavailableError
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import step_pb2
from stepwire_server.rpc.drain import Drain, DrainStatistics
from tests.server.rpc.streams import COMMIT, Attached

PATIENCE_SECONDS = 120.0


def test_steps_pass_side_by_side() -> None:
    drain = Drain()
    with drain.admit(), drain.admit():
        assert drain.wait(0.0) is False
        assert drain.statistics() == DrainStatistics(started=False, steps=2)
    assert (drain.wait(0.0), drain.started) == (True, False)
    assert drain.statistics() == DrainStatistics(started=False, steps=0)


def test_a_drain_that_has_started_refuses_steps_and_says_when_to_come_back() -> None:
    drain = Drain(retry_after_seconds=2.5)
    drain.start()
    with pytest.raises(UnavailableError, match="shutting down") as refused, drain.admit():
        raise AssertionError("admitted")
    assert (refused.value.reason, refused.value.retry_after_seconds) == (Reason.SHUTTING_DOWN, 2.5)
    assert (drain.started, drain.wait(0.0)) == (True, True)
    assert drain.statistics() == DrainStatistics(started=True, steps=0)


def test_steps_under_way_may_finish_and_starting_twice_is_harmless() -> None:
    drain = Drain()
    with drain.admit():
        drain.start()
        drain.start()
        assert drain.wait(0.0) is False
        assert drain.statistics() == DrainStatistics(started=True, steps=1)
    assert drain.wait(0.0) is True


def test_a_wait_is_ended_before_or_after_it_begins() -> None:
    drain, ended = Drain(), list[bool]()
    with drain.admit():
        waiting = threading.Thread(target=lambda: ended.append(drain.wait(PATIENCE_SECONDS * 100)))
        waiting.start()
        drain.hasten()
        waiting.join(PATIENCE_SECONDS)
        assert ended == [False]
        assert drain.wait(PATIENCE_SECONDS * 100) is False
    assert drain.wait(0.0) is True


def test_a_step_that_fails_has_left() -> None:
    drain = Drain()
    with pytest.raises(ZeroDivisionError), drain.admit():
        raise ZeroDivisionError
    assert drain.wait(0.0) is True


def test_waiting_ends_with_the_last_step() -> None:
    drain, leave, emptied = Drain(), threading.Event(), []

    def step(entered: threading.Event) -> None:
        with drain.admit():
            entered.set()
            assert leave.wait(PATIENCE_SECONDS)

    entries = [threading.Event() for _ in range(3)]
    threads = [threading.Thread(target=step, args=(entered,)) for entered in entries]
    threads.append(threading.Thread(target=lambda: emptied.append(drain.wait(PATIENCE_SECONDS))))
    for thread in threads[:3]:
        thread.start()
    for entered in entries:
        assert entered.wait(PATIENCE_SECONDS)
    threads[3].start()
    leave.set()
    for thread in threads:
        thread.join()
    assert emptied == [True]


def test_a_silent_step_does_not_keep_the_server_for_the_whole_drain(
    serve: Any, connect: Any, make_live: Any, make_config: Any, clock: Any, refusal: Any
) -> None:
    """It has no commit, so nothing is lost; a client that goes on sending has all of the time."""
    with serve(drain_seconds=30.0, step_idle_seconds=60.0) as server, connect(server.target) as wire:
        lives = [make_live(wire, wire.create(make_config((2,)))) for _ in range(2)]
        silent, busy = (Attached(live, live.token) for live in lives)
        for attached in (silent, busy):
            attached.stream.send(pb.AttachRequest(begin=step_pb2.StepBegin(step=1, await_admission=True)))
            assert attached.receive().HasField("admitted")
        with ThreadPoolExecutor(1) as threads:
            drained = threads.submit(server.drain)
            clock.now += 14.0
            busy.stream.send(busy.live.frame(payload=busy.live.gradient(1)), COMMIT)
            assert busy.receive().result.step == 1
            clock.now += 2.0
            assert drained.result()
        refusal(silent.receive, "CANCELLED", "")
