"""The hold of a worker, against a server that loses replies on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import stepwire
from stepwire.arrays.packing import Packer
from stepwire.connection.channel import Calls
from stepwire.connection.retry import Deadline
from stepwire.layout import TensorSpec, place
from stepwire.links.hold import Hold
from stepwire.steps.call import StepCall
from stepwire.steps.description import SessionDescription
from stepwire.transports.route import Route, Router
from stepwire.v1 import attach_pb2, session_pb2, step_pb2, transport_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from stepwire.wire.dtypes import FLOAT32
from tests.support.attach_scripts import Server, answer, lose_the_answer, opened, serve_steps

PATIENCE_SECONDS = 120.0
OPENING = attach_pb2.AttachOpen(session_id="s", attach_token=7, epoch=1, transport=transport_pb2.TRANSPORT_GRPC)
PACKER = Packer(place([TensorSpec("w", (5,))], 1))


def hold(calls: Calls, *, token: int = 7, applied_step: int = 3, chunk_bytes: int = 1 << 16) -> Hold:
    session = session_pb2.Session(session_id="s", epoch=1, applied_step=applied_step, applied_load=1)
    return Hold(Route(Router(calls, "tcp"), "s"), SessionDescription(session, PACKER, chunk_bytes), token)


def call(step: int) -> StepCall:
    gradient = [np.arange(5, dtype=np.float32)]
    return StepCall(step_pb2.StepBegin(step=step), gradient, FLOAT32, [np.zeros(5, np.float32)], FLOAT32)


def deadline() -> Deadline:
    return Deadline(PATIENCE_SECONDS)


def test_a_step_is_begin_chunks_and_commit(scripted: Any, scripted_calls: Calls) -> None:
    server = Server(scripted, serve_steps(3))
    held, step = hold(scripted_calls, chunk_bytes=8), call(4)
    assert held.step(step, deadline()).step == 4
    held.detach()
    _, *sent = server.received[0]
    assert [(frame.HasField("begin"), frame.chunk.offset, frame.HasField("commit")) for frame in sent] == [
        (True, 0, False),
        (False, 2, False),
        (False, 4, True),
    ]
    assert [np.frombuffer(frame.payload, np.float32).tolist() for frame in sent] == [[0, 1], [2, 3], [4]]
    assert step.targets[0].tolist() == [4] * 5
    assert held.applied_step == 4


def test_a_step_whose_answer_was_lost_is_asked_for_without_its_gradient(scripted: Any, scripted_calls: Calls) -> None:
    server = Server(scripted, lose_the_answer(3), serve_steps(4))
    held, step = hold(scripted_calls), call(4)
    with pytest.raises(stepwire.UnavailableError):
        held.step(step, deadline())
    assert held.applied_step == 3
    assert held.step(step, deadline()).step == 4
    held.detach()
    assert server.received[1][0].open == OPENING
    assert server.received[1][1:] == [pb.AttachRequest(begin=step.begin, commit=step_pb2.StepCommit())]
    assert (held.applied_step, step.targets[0].tolist()) == (4, [4] * 5)


def test_a_step_that_was_not_applied_is_sent_again_whole(scripted: Any, scripted_calls: Calls) -> None:
    server = Server(scripted, lose_the_answer(3), serve_steps(3))
    held, step = hold(scripted_calls), call(4)
    with pytest.raises(stepwire.UnavailableError):
        held.step(step, deadline())
    held.step(step, deadline())
    held.detach()
    assert server.received[1][1:] == server.received[0][1:]


@pytest.mark.parametrize("applied", [0, 2])
def test_a_server_that_knows_less_has_lost_steps(scripted: Any, scripted_calls: Calls, applied: int) -> None:
    server = Server(scripted, serve_steps(applied))
    held = hold(scripted_calls)
    with pytest.raises(stepwire.StateLossError) as lost:
        held.step(call(4), deadline())
    assert (lost.value.durable_step, lost.value.applied_step, lost.value.lost_load) == (applied, 3, False)
    assert (held.applied_step, len(server.received[0])) == (applied, 1)


@pytest.mark.parametrize("applied", [5, 9])
def test_a_session_that_moved_on_its_own_is_not_stepped(scripted: Any, scripted_calls: Calls, applied: int) -> None:
    server = Server(scripted, serve_steps(applied))
    held = hold(scripted_calls)
    with pytest.raises(stepwire.StepMismatchError) as refused:
        held.step(call(4), deadline())
    assert refused.value.metadata == {"expected_step": str(applied + 1), "actual_step": "4"}
    assert len(server.received[0]) == 1


def test_a_client_that_acquires_the_worker_learns_where_the_session_is(scripted: Any, scripted_calls: Calls) -> None:
    server = Server(scripted, serve_steps(12))
    held = hold(scripted_calls, token=0, applied_step=3)
    held.attach(deadline())
    held.detach()
    assert server.received[0][0].open.attach_token == 0
    assert (held.token, held.applied_step, held.applied_load) == (7, 12, 1)


def test_attaching_twice_keeps_the_stream(scripted: Any, scripted_calls: Calls) -> None:
    server = Server(scripted, serve_steps(3))
    held = hold(scripted_calls)
    assert held.attach(deadline()) is held.attach(deadline())
    held.detach()
    held.detach()
    assert len(server.received) == 1


def test_an_answer_with_a_hole_is_no_answer(scripted: Any, scripted_calls: Calls) -> None:
    def holed(requests: Iterator[pb.AttachRequest]) -> Iterator[pb.AttachResponse]:
        next(requests)
        yield opened(3)
        next(requests)
        yield answer(4, elements=3)

    Server(scripted, holed)
    held = hold(scripted_calls)
    with pytest.raises(stepwire.UnavailableError, match="the reply to step 4 lacks 2 elements"):
        held.step(call(4), deadline())
    assert held.applied_step == 3
