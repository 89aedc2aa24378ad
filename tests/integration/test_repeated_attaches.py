"""A first attach that was repeated, and whose attempts arrive in any order: the client keeps its worker."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import stepwire
from stepwire.v1 import attach_pb2
from stepwire.v1.optimizer_service_pb2_grpc import OptimizerServiceStub
from tests.support.numpy_server import numpy_server
from tests.support.raw import RawStream, Refused, step_message

WEIGHTS = {"w": np.ones(8, np.float32)}
ONES = np.ones(8, np.float32)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


class Streams:
    """Attached streams of one server."""

    def __init__(self, target: str, stack: contextlib.ExitStack) -> None:
        self._stub: Any = OptimizerServiceStub(stack.enter_context(grpc.insecure_channel(target)))
        self._stack = stack

    def attach(self, session_id: str, **fields: Any) -> tuple[RawStream, Any]:
        stream = RawStream(self._stub, attach_pb2.AttachOpen(session_id=session_id, **fields))
        self._stack.callback(stream.cancel)
        message = stream.receive()
        assert message is not None
        return stream, message.opened


def created(target: str, stack: contextlib.ExitStack, **options: Any) -> str:
    client = stack.enter_context(stepwire.connect(target))
    return client.create_session(WEIGHTS, keep=True, **options).session_id


def test_a_first_attach_that_arrives_late_fences_nobody(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(numpy_server())
    session_id, streams = created(server.target, stack), Streams(server.target, stack)
    known, opened = streams.attach(session_id, acquisition=7)
    assert known.step(step_message(1, ONES)).step == 1
    streams.attach(session_id, acquisition=7)  # sent before, on a connection that broke
    with pytest.raises(Refused) as refused:
        known.step(step_message(2, ONES))
    assert refused.value.row == ("UNAVAILABLE", "STREAM_DISPLACED")
    back, _ = streams.attach(session_id, attach_token=opened.attach_token)
    assert back.step(step_message(2, ONES)).step == 2
    streams.attach(session_id, acquisition=8)
    with pytest.raises(Refused) as refused:
        streams.attach(session_id, attach_token=opened.attach_token)
    assert refused.value.row == ("FAILED_PRECONDITION", "FENCED")


def test_the_next_server_knows_the_client_of_the_first_attempt(
    stack: contextlib.ExitStack, tmp_path: pathlib.Path
) -> None:
    with numpy_server(data_dir=str(tmp_path)) as server, contextlib.ExitStack() as inner:
        session_id, streams = created(server.target, inner, durability="journal"), Streams(server.target, inner)
        _, opened = streams.attach(session_id, acquisition=7)
        streams.attach(session_id, acquisition=7)
    server = stack.enter_context(numpy_server(data_dir=str(tmp_path)))
    back, _ = Streams(server.target, stack).attach(session_id, attach_token=opened.attach_token)
    assert back.step(step_message(1, ONES)).step == 1


def test_attempts_for_any_worker_take_one(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(numpy_server())
    session_id = created(server.target, stack, aggregation=stepwire.Aggregation(workers=3))
    streams = Streams(server.target, stack)
    found = [streams.attach(session_id, any_worker=True, acquisition=number)[1].worker for number in (1, 1, 2, 1)]
    assert found == [found[0], found[0], found[2], found[0]]
    assert found[2] != found[0]
