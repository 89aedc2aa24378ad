"""The floor: raw gRPC moving the same bytes in the same messages, without an optimizer.

`python echo.py [OPTION=VALUE …]` serves three methods over TCP and over a Unix socket, with options of gRPC, until its
standard input ends. The process prints its port and its path.

- `Echo` replies to each message with a message of the size in its first bytes.
- `Duplex` sends each message back as it arrives.
- `PushPull` receives messages up to the one that is marked last, and then sends them all back.
"""

from __future__ import annotations

import contextlib
import pathlib
import queue
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc

from child import child, python
from stepwire.wire.channel_options import BULK_OPTIONS

__all__ = ["EchoStream", "EchoTargets", "bulk_messages", "echo_process", "sized_message"]

_UNBOUNDED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
_SIZE_BYTES = 8
_LAST = b"L"
_MORE = b"M"
_CHUNK_BYTES = 4 << 20


Options = Sequence[tuple[str, int]]


class EchoTargets(NamedTuple):
    """The addresses of the echo server.

    Attributes:
        tcp: the host and the port.
        unix: the path, as gRPC writes it.
    """

    tcp: str
    unix: str


def _echo(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    replies: dict[int, bytes] = {}
    for message in messages:
        size = int.from_bytes(message[:_SIZE_BYTES], "little")
        yield replies.setdefault(size, bytes(size))


def _duplex(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from messages


def _push_pull(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    held: list[bytes] = []
    for message in messages:
        held.append(message)
        if message[:1] == _LAST:
            held.reverse()
            while held:
                yield held.pop()


def serve(options: Options) -> None:
    """Serve until standard input ends."""
    server = grpc.server(ThreadPoolExecutor(128), options=[*options, *_UNBOUNDED])
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: grpc.stream_stream_rpc_method_handler(method)
        for name, method in (("Echo", _echo), ("Duplex", _duplex), ("PushPull", _push_pull))
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", methods),))
    with tempfile.TemporaryDirectory(prefix="stepwire-") as folder:
        path = str(pathlib.Path(folder, "socket"))
        port = server.add_insecure_port("127.0.0.1:0")
        server.add_insecure_port(f"unix:{path}")
        server.start()
        print(port, path, flush=True)
        sys.stdin.read()
        server.stop(None).wait()


@contextlib.contextmanager
def echo_process(options: Options = BULK_OPTIONS) -> Iterator[EchoTargets]:
    """Run the echo server as a process of its own."""
    with child(python(__file__, *(f"{name}={value}" for name, value in options))) as process:
        port, path = process.read().split(maxsplit=1)
        yield EchoTargets(f"127.0.0.1:{port}", f"unix:{path}")


class EchoStream:
    """One stream to the echo server on a connection of its own."""

    def __init__(self, target: str, method: str, options: Options = BULK_OPTIONS) -> None:
        alone = ("grpc.use_local_subchannel_pool", 1)
        self._channel = grpc.insecure_channel(target, options=[*options, *_UNBOUNDED, alone])
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        stream: Any = self._channel.stream_stream(f"/bench/{method}")
        self._call = stream(iter(self._outbox.get, None))

    def round_trip(self, message: bytes) -> bytes:
        """Send one message and return its reply."""
        self._outbox.put(message)
        reply: bytes = next(self._call)
        return reply

    def exchange(self, messages: Sequence[bytes]) -> None:
        """Send messages and receive as many, in the order of the method."""
        for message in messages:
            self._outbox.put(message)
        for _ in messages:
            next(self._call)

    def close(self) -> None:
        """End the stream and the connection."""
        self._outbox.put(None)
        self._call.cancel()
        self._channel.close()


def sized_message(request_bytes: int, reply_bytes: int) -> bytes:
    """Return a message of one size that requests a reply of another size."""
    return reply_bytes.to_bytes(_SIZE_BYTES, "little") + bytes(request_bytes - _SIZE_BYTES)


def bulk_messages(payload_bytes: int, chunk_bytes: int = _CHUNK_BYTES) -> list[bytes]:
    """Return the messages of a payload, the last one marked; each in memory of its own, as a payload's chunks are."""
    starts = range(0, payload_bytes, chunk_bytes)
    lengths = [min(chunk_bytes, payload_bytes - start) for start in starts]
    return [
        (_LAST if index == len(lengths) - 1 else _MORE) + b"\1" * (length - 1) for index, length in enumerate(lengths)
    ]


def _options(arguments: Sequence[str]) -> Options:
    pairs = [argument.split("=") for argument in arguments]
    return tuple((name, int(value)) for name, value in pairs)


if __name__ == "__main__":
    serve(_options(sys.argv[1:]))
