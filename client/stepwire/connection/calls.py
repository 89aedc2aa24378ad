"""The calls below an attached stream: messages sent, messages received, an end.

gRPC's own stream has two threads that the caller of a small step waits for: one sends, one hands out events. Each wake
of a sleeping thread costs tens of microseconds, more than the step. A `DirectCall` has none: whoever receives waits
for the call's events itself, as gRPC's unary calls do. Messages that are still being made have a thread, from the first
such batch on.

A `ThreadedCall` is gRPC's own stream. It sends and receives large gradients at the same time, whatever its reader does
between two messages.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol, TypeAlias

import grpc

__all__ = ["ATTACH", "Metadata", "StreamCall", "ThreadedCall", "open_call"]

ATTACH: Final = "/stepwire.v1.OptimizerService/Attach"
"""The path of the method."""

Metadata: TypeAlias = tuple[tuple[str, str], ...]
"""The metadata of a call."""


class StreamCall(Protocol):
    """One call of the method Attach. `cancel` and `close` may be called from any thread."""

    def put(self, messages: Iterable[bytes]) -> None:
        """Send messages: a list or a tuple is there already, anything else is made when the wire has room for it."""
        ...

    def half_close(self) -> None:
        """Send nothing more."""
        ...

    def receive(self) -> bytes:
        """Wait for the next message.

        Raises:
            StopIteration: the server ended the call without an error.
            grpc.RpcError: the error that the call ended with.
        """
        ...

    def cancel(self) -> None:
        """End the call, and the wait of whoever receives."""
        ...

    def close(self) -> None:
        """End the call and its threads. Closing twice is harmless."""
        ...

    def on_end(self, callback: Callable[[], object]) -> None:
        """Call a function when a thread of the call's own has seen its end."""
        ...


def open_call(channel: grpc.Channel, metadata: Metadata, *, direct: bool) -> StreamCall:
    """Begin a call of Attach.

    Args:
        channel: the channel.
        metadata: the metadata of the call.
        direct: without threads in between, for messages that are short. A channel, or a gRPC, that has no such calls
            gets a `ThreadedCall`.
    """
    if direct:
        try:
            from stepwire.connection.direct_call import DirectCall

            return DirectCall(channel, metadata)
        except (AttributeError, ImportError, TypeError):  # gRPC's own names, which a later one may have changed
            pass
    return ThreadedCall(channel, metadata)


class _Outbox(Iterator[bytes]):
    """Messages to send, made when they are asked for: at most one waits beside the one on the wire."""

    def __init__(self) -> None:
        self._batches: queue.SimpleQueue[Iterator[bytes] | None] = queue.SimpleQueue()
        self._current: Iterator[bytes] = iter(())

    def put(self, messages: Iterable[bytes]) -> None:
        self._batches.put(iter(messages))

    def close(self) -> None:
        self._batches.put(None)

    def __next__(self) -> bytes:
        while (message := next(self._current, None)) is None:
            if (batch := self._batches.get()) is None:
                raise StopIteration
            self._current = batch
        return message


class ThreadedCall:
    """gRPC's own stream.

    gRPC reads the outbox in a thread of its own, so a large gradient is packed while its start is being sent.
    """

    def __init__(self, channel: grpc.Channel, metadata: Metadata) -> None:
        """Begin the call."""
        self._outbox = _Outbox()
        stub: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            ATTACH, request_serializer=None, response_deserializer=None
        )
        self._call = stub(self._outbox, metadata=metadata)

    def put(self, messages: Iterable[bytes]) -> None:
        """See `StreamCall`."""
        self._outbox.put(messages)

    def half_close(self) -> None:
        """See `StreamCall`."""
        self._outbox.close()

    def receive(self) -> bytes:
        """See `StreamCall`."""
        message: bytes = next(self._call)
        return message

    def cancel(self) -> None:
        """See `StreamCall`."""
        self._call.cancel()

    def close(self) -> None:
        """See `StreamCall`."""
        self._outbox.close()
        self._call.cancel()

    def on_end(self, callback: Callable[[], object]) -> None:
        """See `StreamCall`."""

        def ended() -> None:
            self._outbox.close()
            callback()

        if not self._call.add_callback(ended):
            ended()
