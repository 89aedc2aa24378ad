"""SIGTERM: steps under way finish with their answers, new ones are refused with when to come back, exit code 0."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.integration.processes import ServerProcess, run_command
from tests.integration.proxy import Proxy
from tests.integration.raw import RawClient, RawStream, Refused, step_message
from tests.integration.training import TINY, WIDE

import stepwire
from stepwire.errors import Reason
from stepwire.v1 import optimizer_service_pb2 as pb

_SIZE = 100
GRADIENT = np.random.default_rng(11).standard_normal(_SIZE, np.float32)
HALF, REST = slice(0, 50), slice(50, _SIZE)


@pytest.fixture
def flags() -> list[str]:
    """Further flags of the server."""
    return []


@pytest.fixture
def process(flags: list[str]) -> Iterator[ServerProcess]:
    """A server that can be told to stop."""
    with ServerProcess(*flags) as process:
        yield process


@pytest.fixture
def raw(process: ServerProcess) -> Iterator[RawClient]:
    """A raw client of the process."""
    with RawClient(process.target) as raw:
        yield raw


def idle_stream(raw: RawClient) -> RawStream:
    """Attach to a session of its own, and do nothing."""
    created = raw.create(_SIZE)
    stream = raw.attach(created.session.session_id, created.attach_token)
    stream.receive()
    return stream


def half_a_step(raw: RawClient) -> RawStream:
    """Attach and send half a step; returns when the server is in the midst of it, which its memory shows."""
    stream = idle_stream(raw)
    held = raw.info().devices[0].reserved_bytes
    stream.send(step_message(1, GRADIENT, HALF, commit=False))
    asked = itertools.count()
    while raw.info().devices[0].reserved_bytes == held:
        assert next(asked) < 100_000, "the server did not begin the step"
    return stream


def assert_refused(act: Callable[[], object]) -> None:
    """The act is refused because the server goes away, with when to come back."""
    with pytest.raises(Refused) as refused:
        act()
    assert refused.value.row == ("UNAVAILABLE", "SHUTTING_DOWN")
    assert refused.value.retry_after_seconds == 1.0


def test_a_step_under_way_finishes_and_new_ones_are_refused(process: ServerProcess, raw: RawClient) -> None:
    calm = raw.create(_SIZE)
    calm = raw.step(calm.session.session_id, calm.attach_token, 1, GRADIENT)
    other = raw.create(_SIZE)
    idle, silent, busy = idle_stream(raw), idle_stream(raw), half_a_step(raw)
    assert run_command("health", "--target", process.target) == 0

    process.signal(signal.SIGTERM)
    process.wait_for("draining")
    assert raw.info().draining
    assert run_command("health", "--target", process.target) == 1
    assert_refused(lambda: idle.take(step_message(1, GRADIENT)))
    assert_refused(lambda: raw.step(other.session.session_id, other.attach_token, 1, GRADIENT))
    assert_refused(lambda: raw.create(_SIZE))
    assert_refused(lambda: raw.load(other.session.session_id, other.attach_token, 1, GRADIENT))

    busy.send(step_message(1, GRADIENT, REST, begin=False))
    answer = busy.receive()
    assert (answer.result.step, answer.result.replayed) == (1, False)
    assert answer.payload == calm.payload
    assert answer.result.telemetry.grad_norm == calm.result.telemetry.grad_norm
    assert process.exit_code() == 0
    with pytest.raises(Refused) as ended:
        silent.receive()
    assert ended.value.code in {"CANCELLED", "UNAVAILABLE"}
    assert run_command("health", "--target", process.target, "--timeout", "0.2") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_streams_do_not_keep_the_server(
    process: ServerProcess, connect: Callable[[str], stepwire.Client], number: signal.Signals
) -> None:
    sessions = [TINY.create(connect(process.target)) for _ in range(3)]
    for session in sessions:
        session.step(TINY.gradient(1))
    channel = grpc.insecure_channel(process.target)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30.0)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    process.signal(number)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert process.exit_code() == 0
    channel.close()
    with pytest.raises(stepwire.UnavailableError):
        sessions[0].step(TINY.gradient(2), timeout=0.2)


def test_the_real_client_is_told_that_the_server_goes_away(
    process: ServerProcess, raw: RawClient, connect: Callable[[str], stepwire.Client]
) -> None:
    session = TINY.create(connect(process.target))
    session.step(TINY.gradient(1))
    busy = half_a_step(raw)
    process.signal(signal.SIGTERM)
    process.wait_for("draining")
    with pytest.raises(stepwire.UnavailableError) as refused:
        session.step(TINY.gradient(2), timeout=0.5)
    assert (refused.value.reason, refused.value.retry_after_seconds) == (Reason.SHUTTING_DOWN, 1.0)
    assert session.applied_step == 1
    assert session.state().step == 1
    assert busy.take(step_message(1, GRADIENT, REST, begin=False)).step == 1
    assert process.exit_code() == 0


@pytest.mark.parametrize("flags", [["--drain-seconds", "0.1"]])
def test_a_step_that_never_ends_is_cut_and_the_exit_code_says_so(process: ServerProcess, raw: RawClient) -> None:
    busy = half_a_step(raw)
    process.signal(signal.SIGTERM)
    assert process.exit_code() == 1
    with pytest.raises(Refused) as ended:
        busy.receive()
    assert ended.value.code in {"CANCELLED", "UNAVAILABLE"}


def test_the_answer_of_the_last_step_reaches_a_slow_reader(process: ServerProcess) -> None:
    """The whole answer is on its way when the server stops; the client reads it only then."""
    parameters, gradient = WIDE.parameters(), WIDE.gradient(1)
    size = sum(array.size for array in parameters.values())
    flat = np.concatenate([array.reshape(-1) for array in gradient.values()])
    with Proxy(process.target) as proxy, RawClient(proxy.target) as raw:
        created = raw.create(size)
        stream = raw.attach(created.session.session_id, created.attach_token)
        stream.receive()
        proxy.hold("down")
        stream.send(step_message(1, flat))
        proxy.wait_held("down")
        process.signal(signal.SIGTERM)
        assert process.exit_code() == 0
        proxy.release("down")
        chunks = []
        while not (answer := stream.receive()).HasField("result"):
            chunks.append(answer)
    assert sum(chunk.chunk.count for chunk in chunks) == size
    assert (answer.result.step, answer.result.replayed) == (1, False)
    assert pb.AttachResponse.FromString(answer.SerializeToString()) == answer
