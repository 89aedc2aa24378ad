"""SIGTERM: steps under way finish with their answers, new ones are refused with when to come back, exit code 0."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import stepwire
from stepwire.errors import Reason
from stepwire.wire.channel_options import BULK_OPTIONS
from tests.integration.processes import ServerProcess, run_command
from tests.integration.training import TINY
from tests.support.raw import RawClient, RawStream, Refused, Vector, step_message

pytestmark = pytest.mark.slow

_SIZE = 100
GRADIENT = np.random.default_rng(11).standard_normal(_SIZE, np.float32)
REST = slice(50, _SIZE)


@pytest.fixture
def flags() -> list[str]:
    """Further flags of the server, which has patience with half a step on a machine under load."""
    return ["--drain-seconds", "300"]


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


def idle_stream(raw: RawClient, size: int = _SIZE) -> RawStream:
    """Attach to a session of its own, and do nothing."""
    created = raw.create(size)
    stream = raw.attach(created.session.session_id, created.attach_token)
    stream.receive()
    return stream


def half_a_step(raw: RawClient, gradient: Vector = GRADIENT) -> RawStream:
    """Attach and send half a step; returns when the server is in the midst of it, which its memory shows."""
    stream = idle_stream(raw, len(gradient))
    held = raw.info().devices[0].reserved_bytes
    stream.send(step_message(1, gradient, slice(0, len(gradient) // 2), commit=False))
    asked = itertools.count()
    while raw.info().devices[0].reserved_bytes == held:
        assert next(asked) < 100_000, "the server did not begin the step"
    return stream


def health_of(process: ServerProcess) -> int:
    """Return the exit code of `stepwire health`, which has all the time of a machine under load."""
    return run_command("health", "--target", process.target, "--timeout", "100")


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
    assert health_of(process) == 0

    process.signal(signal.SIGTERM)
    process.wait_for("draining")
    assert raw.info().draining
    assert health_of(process) == 1
    assert_refused(lambda: idle.step(step_message(1, GRADIENT)))
    assert_refused(lambda: raw.step(other.session.session_id, other.attach_token, 1, GRADIENT))
    assert_refused(lambda: raw.create(_SIZE))
    assert_refused(lambda: raw.load(other.session.session_id, other.attach_token, 1, GRADIENT))

    busy.send(step_message(1, GRADIENT, REST, begin=False))
    answer = busy.receive()
    assert (answer.result.step, answer.result.replayed) == (1, False)
    assert answer.payload == calm.payload
    assert answer.result.telemetry.grad_norm == calm.result.telemetry.grad_norm
    assert_refused(busy.receive)
    assert process.exit_code() == 0
    with pytest.raises(Refused) as ended:
        silent.receive()
    assert ended.value.code in {"CANCELLED", "UNAVAILABLE"}
    assert run_command("health", "--target", process.target, "--timeout", "0.2") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_streams_do_not_keep_the_server(
    process: ServerProcess, connect_once: Callable[[str], stepwire.Client], number: signal.Signals
) -> None:
    sessions = [TINY.create(connect_once(process.target)) for _ in range(3)]
    for session in sessions:
        session.step(TINY.gradient(1))
    channel = grpc.insecure_channel(process.target)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    process.signal(number)
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    channel.close()
    assert process.exit_code() == 0
    with pytest.raises(stepwire.UnavailableError):
        sessions[0].step(TINY.gradient(2))


def test_signals_that_keep_coming_do_not_keep_the_server(process: ServerProcess) -> None:
    """A handler may be interrupted by the next signal, and then waits for nothing."""
    for _ in range(100):
        process.signal(signal.SIGTERM)
    assert process.exit_code() == 0


def test_the_real_client_is_told_that_the_server_goes_away(
    process: ServerProcess, raw: RawClient, connect_once: Callable[[str], stepwire.Client]
) -> None:
    session = TINY.create(connect_once(process.target))
    session.step(TINY.gradient(1))
    busy = half_a_step(raw)
    process.signal(signal.SIGTERM)
    process.wait_for("draining")
    with pytest.raises(stepwire.UnavailableError) as refused:
        session.step(TINY.gradient(2))
    assert (refused.value.reason, refused.value.retry_after_seconds) == (Reason.SHUTTING_DOWN, 1.0)
    assert session.applied_step == 1
    assert session.state().step == 1
    assert busy.step(step_message(1, GRADIENT, REST, begin=False)).step == 1
    assert process.exit_code() == 0


@pytest.mark.parametrize("flags", [["--drain-seconds", "0.1", "--sweep-seconds", "3600"]])
def test_a_step_that_never_ends_is_cut_and_the_exit_code_says_so(process: ServerProcess, raw: RawClient) -> None:
    busy = half_a_step(raw)
    process.signal(signal.SIGTERM)
    assert process.exit_code() == 1
    with pytest.raises(Refused) as ended:
        busy.receive()
    assert ended.value.code in {"CANCELLED", "UNAVAILABLE"}


@pytest.mark.parametrize("flags", [["--drain-seconds", "100000"]])
def test_a_second_signal_ends_the_wait_for_steps(process: ServerProcess, raw: RawClient) -> None:
    busy = half_a_step(raw)
    process.signal(signal.SIGTERM)
    process.wait_for("draining")
    with ThreadPoolExecutor(1) as threads:
        hastened = threads.submit(process.wait_for, "hastened")
        while not hastened.done():  # signals that come at once are one
            process.signal(signal.SIGTERM)
    assert process.exit_code() == 1
    with pytest.raises(Refused) as ended:
        busy.receive()
    assert ended.value.code in {"CANCELLED", "UNAVAILABLE"}


def test_the_answer_of_the_last_step_is_there_for_a_slow_reader(process: ServerProcess) -> None:
    """The client reads nothing until the server is gone; its window has room for the whole answer."""
    size = 300_000
    gradient = np.random.default_rng(12).standard_normal(size, np.float32)
    with RawClient(process.target, *BULK_OPTIONS) as raw:
        calm, slow = idle_stream(raw, size), half_a_step(raw, gradient)
        calm.send(step_message(1, gradient))
        expected = parameters_of(calm)
        process.signal(signal.SIGTERM)
        process.wait_for("draining")
        slow.send(step_message(1, gradient, slice(size // 2, size), begin=False))
        assert process.exit_code() == 0
        assert parameters_of(slow) == expected
        assert_refused(slow.receive)


def parameters_of(stream: RawStream) -> bytes:
    """Return the parameters that answer a step."""
    chunks = []
    while (answer := stream.receive()) is not None:
        chunks.append(answer.payload)
        if answer.HasField("result"):
            return b"".join(chunks)
    raise AssertionError("the stream ended without a result")
