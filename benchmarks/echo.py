"""The floor: raw gRPC moving the same bytes in the same messages, with no optimizer behind it.

`python echo.py` serves two methods in a process of its own and prints its port: `Echo` answers each message with a
message of the size that its first bytes ask for; `PushPull` takes messages until one is marked last and then sends
as many back.
"""

from __future__ import annotations

import queue
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from stepwire.transport_options import BULK_OPTIONS

_OPTIONS = [*BULK_OPTIONS, ("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_SIZE_BYTES = 8
_LAST = b"L"
_MORE = b"M"


def _echo(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    answers: dict[int, bytes] = {}
    for message in messages:
        size = int.from_bytes(message[:_SIZE_BYTES], "little")
        yield answers.setdefault(size, bytes(size))


def _push_pull(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    held: list[bytes] = []
    for message in messages:
        held.append(message)
        if message[:1] == _LAST:
            held.reverse()
            while held:
                yield held.pop()


def serve() -> None:
    """Serve until killed."""
    server = grpc.server(ThreadPoolExecutor(128), options=_OPTIONS)
    methods = {
        "Echo": grpc.stream_stream_rpc_method_handler(_echo),
        "PushPull": grpc.stream_stream_rpc_method_handler(_push_pull),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", methods),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()


@contextmanager
def echo_process() -> Iterator[str]:
    """Run the echo server as a process of its own; yields its target."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class EchoStream:
    """One stream to the echo server on a connection of its own."""

    def __init__(self, target: str, method: str) -> None:
        self._channel = grpc.insecure_channel(target, options=[*_OPTIONS, ("grpc.use_local_subchannel_pool", 1)])
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call = self._channel.stream_stream(f"/bench/{method}")(iter(self._outbox.get, None))

    def round_trip(self, message: bytes) -> bytes:
        """Send one message and return its answer."""
        self._outbox.put(message)
        return next(self._call)

    def push_pull(self, message_bytes: int, count: int, body: bytes) -> None:
        """Send `count` messages of `message_bytes` and receive as many."""
        for index in range(count):
            self._outbox.put((_LAST if index == count - 1 else _MORE) + body[: message_bytes - 1])
        for _ in range(count):
            next(self._call)

    def close(self) -> None:
        """End the stream and the connection."""
        self._outbox.put(None)
        self._call.cancel()
        self._channel.close()


def sized_message(request_bytes: int, answer_bytes: int) -> bytes:
    """Return a message of one size that asks for an answer of another."""
    return answer_bytes.to_bytes(_SIZE_BYTES, "little") + bytes(request_bytes - _SIZE_BYTES)


if __name__ == "__main__":
    serve()
