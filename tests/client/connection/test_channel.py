"""One channel: deadlines, translation, repetition."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import stepwire
from stepwire.connection.channel import Calls, checked_timeout
from stepwire.connection.line import _gate
from stepwire.connection.retry import Deadline, Retry
from stepwire.lifetimes.forks import forks
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.error_details import status_of

PATIENCE_SECONDS = 120.0
INFO = pb.GetServerInfoResponse(version="1.2.3", sessions=4)


def ask(calls: Calls, timeout_seconds: float | None = None) -> pb.GetServerInfoResponse:
    answer: pb.GetServerInfoResponse = calls.unary(
        "GetServerInfo", pb.GetServerInfoRequest(), pb.GetServerInfoResponse, timeout_seconds
    )
    return answer


def failing(*failures: stepwire.StepwireError) -> Any:
    """Refuse as often as there are failures, then answer; `behavior.calls` counts."""
    left = list(failures)

    def behavior(request: bytes, context: grpc.ServicerContext) -> bytes:
        behavior.calls += 1
        if left:
            context.abort_with_status(status_of(left.pop(0)))
        return INFO.SerializeToString()

    behavior.calls = 0
    return behavior


@pytest.mark.parametrize("seconds", [0.001, 1, 60.0, 1e8, np.float32(0.5), np.int64(30), np.array(3.0)])
def test_a_positive_timeout_is_one(seconds: float) -> None:
    assert checked_timeout(seconds) == seconds
    assert type(checked_timeout(seconds)) is float


@pytest.mark.parametrize("seconds", [float("inf"), 1e10, 1e18, 2**63, 10**400])
def test_a_timeout_beyond_every_program_is_the_longest_that_all_waits_take(
    client: stepwire.Client, seconds: float
) -> None:
    assert checked_timeout(seconds) == 1e8
    with client.create_session({"w": np.zeros(3, np.float32)}) as session:
        session.step({"w": np.ones(3, np.float32)}, timeout=seconds)
        assert session.info(timeout=seconds).applied_step == 1


@pytest.mark.parametrize("seconds", [0, 0.0, -1, float("nan"), "5", None, True, [5.0]])
def test_what_is_no_positive_number_of_seconds_is_refused(seconds: Any) -> None:
    with pytest.raises(stepwire.InvalidRequestError, match="is not a positive number of seconds") as refused:
        checked_timeout(seconds)
    assert refused.value.metadata == {"field": "timeout"}


def test_a_call_brings_its_request_there_and_its_answer_back(scripted: Any, scripted_calls: Calls) -> None:
    scripted.on("CreateSession", lambda request, context: pb.CreateSessionResponse(attach_token=7).SerializeToString())
    answer = scripted_calls.unary("CreateSession", pb.CreateSessionRequest(request_id="r"), pb.CreateSessionResponse)
    assert answer.attach_token == 7


def test_a_passing_trouble_is_repeated_and_a_final_error_is_not(scripted: Any, scripted_calls: Calls) -> None:
    busy = stepwire.UnavailableError("busy")
    behavior = failing(busy, busy, stepwire.InvalidRequestError("bad", metadata={"field": "f"}))
    scripted.on("GetServerInfo", behavior)
    with pytest.raises(stepwire.InvalidRequestError) as refused:
        ask(scripted_calls)
    assert (str(refused.value), refused.value.metadata, behavior.calls) == ("bad", {"field": "f"}, 3)
    assert ask(scripted_calls) == INFO


def test_what_nobody_serves_is_unsupported(scripted_calls: Calls) -> None:
    with pytest.raises(stepwire.UnsupportedFeatureError):
        ask(scripted_calls)


def test_the_server_is_told_the_deadline(scripted: Any, scripted_calls: Calls) -> None:
    left: list[float] = []

    def behavior(request: bytes, context: grpc.ServicerContext) -> bytes:
        left.append(context.time_remaining())
        return b""

    scripted.on("GetServerInfo", behavior)
    ask(scripted_calls, 500.0)
    ask(scripted_calls)
    assert left == [pytest.approx(500.0, abs=20.0), pytest.approx(30.0, abs=10.0)]


def test_no_answer_in_time_is_a_passed_deadline(scripted: Any, scripted_calls: Calls) -> None:
    def silent(request: bytes, context: grpc.ServicerContext) -> bytes:
        scripted.released.wait(PATIENCE_SECONDS)
        return b""

    scripted.on("GetServerInfo", silent)
    with pytest.raises(stepwire.DeadlineExceededError):
        ask(scripted_calls, 0.05)


def test_nobody_listening_is_unavailable_within_the_deadline() -> None:
    """The address is bound and not listened on, so nobody else can take it and every connection is refused."""
    now = [0.0]
    retry = Retry(clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        calls = Calls(f"127.0.0.1:{taken.getsockname()[1]}", timeout_seconds=20.0, retry=retry)
        with pytest.raises(stepwire.UnavailableError) as failed:
            ask(calls)
        calls.close()
    assert failed.value.reason is stepwire.Reason.UNREACHABLE
    assert 0.0 < now[0] < 20.0


def test_a_download_is_cancelled_when_enough_was_taken(scripted: Any, scripted_calls: Calls) -> None:
    over = threading.Event()

    def endless(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(over.set)
        while True:
            yield request

    scripted.on("Pull", endless)
    request = pb.PullRequest(session_id="s")
    first = scripted_calls.download("Pull", request, lambda messages: next(messages), Deadline(PATIENCE_SECONDS))
    assert first == request.SerializeToString()
    assert over.wait(PATIENCE_SECONDS)


def test_an_error_inside_a_download_is_translated(scripted: Any, scripted_calls: Calls) -> None:
    def breaking(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield b"one"
        context.abort_with_status(status_of(stepwire.StateChangedError("moved")))

    scripted.on("Pull", breaking)
    taken: list[bytes] = []
    with pytest.raises(stepwire.StateChangedError, match="moved"):
        scripted_calls.download("Pull", pb.PullRequest(), taken.extend, Deadline(PATIENCE_SECONDS))
    assert taken == [b"one"]


def test_an_upload_sends_messages_in_order(scripted: Any, scripted_calls: Calls) -> None:
    scripted.on(
        "Load",
        lambda messages, context: pb.LoadResponse(replayed=b"".join(messages) == b"abc").SerializeToString(),
    )
    assert scripted_calls.upload("Load", [b"a", b"b", b"c"], pb.LoadResponse, Deadline(PATIENCE_SECONDS)).replayed


def test_an_error_of_an_upload_is_translated(scripted: Any, scripted_calls: Calls) -> None:
    scripted.on("Load", failing(stepwire.FencedError("taken")))
    with pytest.raises(stepwire.FencedError, match="taken"):
        scripted_calls.upload("Load", [], pb.LoadResponse, Deadline(PATIENCE_SECONDS))


def test_closing_twice_is_harmless(scripted_calls: Calls) -> None:
    scripted_calls.close()
    scripted_calls.close()


def test_a_call_that_is_made_once_is_repeated_after_a_fork_alone(scripted: Any, scripted_calls: Calls) -> None:
    cut = [True, False]

    def behavior(request: bytes, context: grpc.ServicerContext) -> bytes:
        if cut.pop(0):
            forks.note()
        context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        raise AssertionError

    scripted.on("GetServerInfo", behavior)
    with pytest.raises(stepwire.UnavailableError):
        scripted_calls.once("GetServerInfo", pb.GetServerInfoRequest(), pb.GetServerInfoResponse, PATIENCE_SECONDS)
    assert cut == []


@pytest.mark.parametrize("reason", [stepwire.Reason.NOT_PRIMARY, stepwire.Reason.STALE_EPOCH])
def test_an_old_owner_is_left_for_the_newer_one(reason: stepwire.Reason) -> None:
    places = iter(["127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:2"])
    calls = Calls("directory:/d/a", timeout_seconds=1.0, retry=Retry(), locate=lambda seconds: next(places))
    error, deadline = stepwire.FencedError("another epoch", reason=reason), calls.deadline(None)
    stays = calls.followed(error, deadline)
    assert (stays is error) == (reason is stepwire.Reason.STALE_EPOCH), "the session came back at the same address"
    moved = calls.followed(error, deadline)
    assert (type(moved), moved.reason) == (stepwire.UnavailableError, stepwire.Reason.UNREACHABLE)
    calls.close()


def test_a_server_that_moves_is_looked_for_while_other_clients_open_their_channels() -> None:
    places, is_free = iter(["127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:2"]), list[bool]()

    def locate(seconds: float) -> str:
        def look() -> None:
            is_free.append(_gate.lock.acquire(blocking=False))
            if is_free[-1]:
                _gate.lock.release()

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return next(places)

    calls = Calls("directory:/d/a", timeout_seconds=1.0, retry=Retry(), locate=locate)
    error = stepwire.UnavailableError("it has gone", reason=stepwire.Reason.UNREACHABLE)
    first, deadline = calls.channel, calls.deadline(None)
    assert calls.followed(error, deadline) is error
    assert calls.channel is first
    assert calls.followed(error, deadline) is error
    second = calls.channel
    assert second is not first
    assert calls.followed(error, deadline) is error
    assert calls.channel is second
    calls.close()
    assert is_free == [True] * 4


def test_the_end_of_a_deadline_ends_the_repetitions_of_a_call_within_it() -> None:
    retry = Retry(sleep=lambda seconds: deadline.end())
    deadline = retry.deadline(3600.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and nobody listens
        calls = Calls(f"127.0.0.1:{silent.getsockname()[1]}", timeout_seconds=3600.0, retry=retry)
        with pytest.raises(stepwire.UnavailableError, match="no server answers"):
            calls.unary("GetServerInfo", pb.GetServerInfoRequest(), pb.GetServerInfoResponse, deadline)
        calls.close()
