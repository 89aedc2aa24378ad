"""An attacker in a process of its own: calls that cost it little and its server a place, a message or a response.

`python flood_child.py TARGET KIND` prints "ready" once the first calls are open. It goes on opening them, so many a
second, until its standard input ends; then its connections are closed.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import grpc

from raw_http2 import RawHttp2, grpc_message
from stepwire.v1 import attach_pb2, optimizer_pb2, session_pb2, state_pb2, step_pb2, tensor_pb2
from stepwire.v1 import optimizer_service_pb2 as pb

__all__ = ["KINDS"]

_SERVICE: Final = "/stepwire.v1.OptimizerService/"
_CONNECTIONS: Final = 8
_CALLS_A_WAVE: Final = 20
_WAVE_SECONDS: Final = 0.05
_FIRST_WAVES: Final = 15
_SIZE: Final = 50_000
_LARGE_BYTES: Final = 6 << 20
_UNREAD: Final = 0
"""The window of a connection that reads no response."""


class Flood:
    """The calls of one kind, on a session of the attacker's own."""

    def __init__(self, target: str) -> None:
        """Make a session that has made a step."""
        config = session_pb2.SessionConfig(
            optimizer=optimizer_pb2.Optimizer(rule=optimizer_pb2.RULE_ADAM),
            tensors=[tensor_pb2.TensorSpec(name="w", shape=[_SIZE])],
            initialization=session_pb2.INITIALIZATION_ZEROS,
        )
        with grpc.insecure_channel(target) as channel:
            create, step = (channel.unary_unary(_SERVICE + name) for name in ("CreateSession", "Step"))
            request = pb.CreateSessionRequest(request_id="attacker", config=config).SerializeToString()
            created = pb.CreateSessionResponse.FromString(create(request))
            self._id, self._token = created.session.session_id, created.attach_token
            step(self._first_step(bytes(4 * _SIZE)))
        self._large = grpc_message(bytes(_LARGE_BYTES), _LARGE_BYTES + 1)

    def silent_call(self, connection: RawHttp2) -> None:
        """A call that brings no message."""
        connection.open(f"{_SERVICE}Step")

    def silent_stream(self, connection: RawHttp2) -> None:
        """A stream that says nothing."""
        connection.open(f"{_SERVICE}Attach")

    def unfinished_message(self, connection: RawHttp2) -> None:
        """A message of 6 MiB without its last byte."""
        connection.open(f"{_SERVICE}Step", self._large)

    def trickling_load(self, connection: RawHttp2) -> None:
        """A load that lives on empty messages."""
        opening = state_pb2.LoadOpen(session_id=self._id, attach_token=self._token, load=1, slots=["param"])
        connection.open(
            f"{_SERVICE}Load", grpc_message(pb.LoadRequest(open=opening).SerializeToString()) + grpc_message(b"")
        )

    def unread_pull(self, connection: RawHttp2) -> None:
        """A pull that nobody reads."""
        self._ask(connection, "Pull", pb.PullRequest(session_id=self._id))

    def unread_reply(self, connection: RawHttp2) -> None:
        """The reply to a step that was made, which nobody reads: 200 KB for a request of 100 bytes."""
        connection.open(f"{_SERVICE}Step", grpc_message(self._first_step()), end=True)

    def refused_call(self, connection: RawHttp2) -> None:
        """A step of a session that is not there."""
        begin = step_pb2.StepBegin(step=1)
        self._ask(connection, "Step", pb.StepRequest(session_id="0" * 32, attach_token=1, begin=begin))

    def refused_attach(self, connection: RawHttp2) -> None:
        """An attach to a session that is not there."""
        opening = attach_pb2.AttachOpen(session_id="0" * 32)
        self._ask(connection, "Attach", pb.AttachRequest(open=opening))

    def health_watch(self, connection: RawHttp2) -> None:
        """A watch of the health."""
        connection.open("/grpc.health.v1.Health/Watch", grpc_message(b""), end=True)

    def _first_step(self, payload: bytes = b"") -> bytes:
        begin = step_pb2.StepBegin(step=1)
        request = pb.StepRequest(session_id=self._id, attach_token=self._token, begin=begin, payload=payload)
        return request.SerializeToString()

    def _ask(self, connection: RawHttp2, method: str, request: Any) -> None:
        connection.open(_SERVICE + method, grpc_message(request.SerializeToString()), end=True)


KINDS: Final = tuple(sorted(name for name in vars(Flood) if not name.startswith("_")))
"""The kinds of floods, each a method of `Flood`."""


def _flood(target: str, call: Callable[[RawHttp2], None], over: threading.Event) -> None:
    connections = [RawHttp2(target, window=_UNREAD) for _ in range(_CONNECTIONS)]
    number = 0
    while not over.wait(_WAVE_SECONDS):
        began = time.perf_counter()
        for index in range(_CALLS_A_WAVE):
            at = (number * _CALLS_A_WAVE + index) % _CONNECTIONS
            try:
                call(connections[at])
                connections[at].read(0.0)
            except OSError:  # the server has closed it
                connections[at].close()
                with contextlib.suppress(OSError):
                    connections[at] = RawHttp2(target, window=_UNREAD)
            if time.perf_counter() - began > 1.0:
                break
        number += 1
        if number == _FIRST_WAVES:
            print("ready", flush=True)
    for connection in connections:
        connection.close()


def main() -> None:
    """Flood until standard input ends."""
    target, kind = sys.argv[1:]
    over = threading.Event()
    thread = threading.Thread(target=_flood, args=(target, getattr(Flood(target), kind), over))
    thread.start()
    sys.stdin.read()
    over.set()
    thread.join()


if __name__ == "__main__":
    main()
