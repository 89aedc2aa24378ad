"""Statistics over the wire: a snapshot at once, rates on the server's clock, and bounds for those that watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.v1 import statistics_pb2
from stepwire.wire.messages import duration_to_wire
from stepwire_server.records.session_snapshot import SessionSnapshot
from stepwire_server.sessions.watching import Rates
from tests.server.conftest import Refused
from tests.support.numpy_server import numpy_pool

OFTEN = pb.GetStatisticsRequest(interval=duration_to_wire(0.1))


def snapshot_of(session_id: str, step: int) -> SessionSnapshot:
    return SessionSnapshot(session_id, "", "", "cpu", "idle", (), step, None, 0, 0, 1, 0.0, None)


def test_rates_are_of_the_steps_between_two_looks() -> None:
    rates = Rates()
    assert rates.look([snapshot_of("a", 5)], 10.0) == {}
    assert rates.look([snapshot_of("a", 9), snapshot_of("b", 3)], 12.0) == {"a": 2.0}
    assert rates.look([snapshot_of("b", 3)], 14.0) == {"b": 0.0}
    assert rates.look([snapshot_of("b", 1)], 15.0) == {"b": 0.0}, "a load has set the step back"
    assert rates.look([snapshot_of("b", 2)], 15.0) == {}, "no time has passed"
    assert rates.look([snapshot_of("b", 3)], 16.0) == {"b": 2.0}, "a look of the same moment takes no step"


class Watching:
    """A call that watches."""

    def __init__(self, wire: Any, request: pb.GetStatisticsRequest = OFTEN) -> None:
        self.stream = wire.open("GetStatistics")
        self.stream.send(request)
        self.stream.finish()

    def next(self) -> pb.GetStatisticsResponse:
        return pb.GetStatisticsResponse.FromString(self.stream.receive())


def test_snapshots_tell_of_the_server_and_its_sessions(
    serve: Any, connect: Any, clock: Any, make_config: Any, make_live: Any
) -> None:
    with serve(pool=numpy_pool()) as server, connect(server.target) as wire:
        live = make_live(wire, wire.create(make_config((10,), label="my <run>")))
        clock.now += 60.0
        watching = Watching(wire)
        first = watching.next()
        assert not first.server.HasField("steps_per_second")
        assert (first.server.sessions, first.server.streams, first.server.draining) == (1, 0, False)
        assert first.server.uptime.seconds == 60
        device = first.server.devices[0]
        assert (device.name, device.budget_bytes, device.reserved_bytes) == (
            "cpu",
            server.registry.pool.limit_bytes,
            120,
        )
        (session,) = first.sessions
        assert (session.session_id, session.label, session.device) == (live.id, "my <run>", "cpu")
        assert (session.applied_step, session.memory_bytes, session.workers) == (0, 120, 1)
        assert session.activity == statistics_pb2.SESSION_ACTIVITY_IDLE
        assert not session.HasField("durable_step")
        assert not session.HasField("last_result")
        assert session.idle.seconds == 60

        result = live.step(1)
        clock.now += 0.5
        while not (second := watching.next()).server.steps_per_second:
            pass  # one that was under way before the clock moved
        assert second.server.steps_per_second == 2.0
        (session,) = second.sessions
        assert (session.applied_step, session.steps_per_second) == (1, 2.0)
        assert session.last_result.telemetry.grad_norm == result.telemetry.grad_norm
        watching.stream.cancel()


@pytest.mark.parametrize("seconds", [0.0, 0.09, -1.0, 3600.5])
def test_an_interval_out_of_range_is_refused(wire: Any, refusal: Any, seconds: float) -> None:
    watching = Watching(wire, pb.GetStatisticsRequest(interval=duration_to_wire(seconds)))
    problem = f"{seconds:g} s is not in [0.1, 3600]"
    refusal(watching.next, "INVALID_ARGUMENT", "INVALID_CONFIG", problem, field="interval")


def test_as_many_watch_as_may_and_those_that_leave_make_room(
    serve: Any, connect: Any, refusal: Any, until: Callable[[Callable[[], bool]], None]
) -> None:
    with serve() as server, connect(server.target) as wire:
        watching = [Watching(wire) for _ in range(16)]
        for each in watching:
            each.next()
        refused = refusal(Watching(wire).next, "RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS", "16 callers watch the server")
        assert refused.retry_after == 1.0
        watching[0].stream.cancel()
        until(lambda: server.registry.streams.watchers == 15)
        Watching(wire).next()


def test_a_server_that_ends_ends_the_calls(serve: Any, connect: Any) -> None:
    with serve() as server, connect(server.target) as wire:
        watching = Watching(wire, pb.GetStatisticsRequest(interval=duration_to_wire(3600.0)))
        watching.next()
        server.close()
        with pytest.raises(Refused) as ended:
            watching.next()
        assert ended.value.code in ("CANCELLED", "UNAVAILABLE")
        assert server.registry.streams.watchers == 0
