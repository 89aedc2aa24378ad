"""Messages that never end, of attached streams: gRPC keeps them, and the server ends them before its memory does."""

from __future__ import annotations

import contextlib
from typing import Final

import numpy as np
import pytest

import stepwire
from stepwire.v1 import attach_pb2
from stepwire.v1 import optimizer_service_pb2 as pb
from tests.attack.test_hostile_requests import resident_bytes, until
from tests.integration.processes import ServerProcess
from tests.support.http2 import RawHttp2, grpc_message

pytestmark = pytest.mark.slow

LIMIT_BYTES: Final = 500 << 20
GIVEN_UP_FROM_BYTES: Final = LIMIT_BYTES * 9 // 10
UNFINISHED_BYTES: Final = 7 << 20
STREAMS: Final = 100
ATTACH: Final = "/stepwire.v1.OptimizerService/Attach"


def hold(connection: RawHttp2, session_id: str) -> None:
    """Attach, and send all of a message but its end."""
    opening = pb.AttachRequest(open=attach_pb2.AttachOpen(session_id=session_id))
    stream = connection.open(ATTACH, grpc_message(opening.SerializeToString()), end=False)
    connection.push(stream, grpc_message(bytes(UNFINISHED_BYTES))[:-1])


@pytest.mark.long
def test_streams_with_unfinished_messages_end_before_the_memory_does() -> None:
    flags = ("--memory-limit", str(LIMIT_BYTES), "--memory-budget", str(64 << 20))
    with ServerProcess(*flags) as process, stepwire.connect(process.target, transport="tcp") as client:
        port = int(process.target.rpartition(":")[2])
        zeros, ones = {"w": np.zeros(10, np.float32)}, {"w": np.ones(10, np.float32)}
        mine, *theirs = (client.create_session(zeros, optimizer=stepwire.SGD(lr=1.0)) for _ in range(1 + STREAMS))
        mine.step(ones)
        with contextlib.ExitStack() as stack:
            for session in theirs:
                hold(stack.enter_context(RawHttp2(port)), session.session_id)
            assert process.wait_for("memory is short; calls and streams that wait for messages were ended")["count"] > 0
            until(lambda: resident_bytes(process.pid) < GIVEN_UP_FROM_BYTES)
            np.testing.assert_array_equal(mine.step(ones)["w"], -2.0)
            assert client.info().sessions == 1 + STREAMS
