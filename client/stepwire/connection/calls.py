"""The calls below an attached stream: messages sent, messages received, an end.

gRPC's own stream has two threads that the caller of a small step waits for: one sends, one hands out events. Each wake
of a sleeping thread costs tens of microseconds, more than the step. A `DirectCall` has none: whoever receives waits
for the call's events itself, as gRPC's unary calls do. So it sends what is there with the wish to receive, in one
operation that has one event. Messages that are still being made have a thread, from the first such batch on.

A `ThreadedCall` is gRPC's own stream. It sends and receives large gradients at the same time, whatever its reader does
between two messages.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol, TypeAlias

import grpc
import grpc._channel as _grpc_channel
import grpc._common as _grpc_common
import grpc._cython.cygrpc as _grpc_core

__all__ = ["DirectCall", "StreamCall", "ThreadedCall", "open_call"]

_log = logging.getLogger("stepwire")
_channel: Any = _grpc_channel
_common: Any = _grpc_common
cygrpc: Any = _grpc_core
_METHOD: Final = "/stepwire.v1.OptimizerService/Attach"
_NO_FLAGS: Final = 0
_CANCELLED: Final = _common.STATUS_CODE_TO_CYGRPC_STATUS_CODE[grpc.StatusCode.CANCELLED]
_RECEIVED, _STATUS, _SENT = (
    cygrpc.OperationType.receive_message,
    cygrpc.OperationType.receive_status_on_client,
    cygrpc.OperationType.send_message,
)
_Metadata: TypeAlias = tuple[tuple[str, str], ...]


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


def open_call(channel: grpc.Channel, metadata: _Metadata, *, direct: bool) -> StreamCall:
    """Begin a call of Attach.

    Args:
        channel: the channel.
        metadata: the metadata of the call.
        direct: without threads in between, for messages that are short; a channel that is not gRPC's own has none.
    """
    if direct and type(channel) is _channel.Channel:
        return DirectCall(channel, metadata)
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

    def __init__(self, channel: grpc.Channel, metadata: _Metadata) -> None:
        """Begin the call."""
        self._outbox = _Outbox()
        stub: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(
            _METHOD, request_serializer=None, response_deserializer=None
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


class DirectCall:
    """A stream whose receiver waits for its events itself. One thread receives at a time.

    gRPC destroys the queue of events with the last event, and a wait after that one crashes the process. So `_due`
    counts the events to come, under the lock that operations are started with.
    """

    def __init__(self, channel: grpc.Channel, metadata: _Metadata) -> None:
        """Begin the call."""
        self._lock = threading.Lock()
        self._receiving = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._sends = self._receives = self._ends = self._closed = False
        self._received: bytes | None = None
        self._status: Any = None
        self._sender: _Sender | None = None
        begin = (
            cygrpc.SendInitialMetadataOperation(metadata, _NO_FLAGS),
            cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS),
        )
        first = (cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS),)
        self._due = 2
        core: Any = channel
        self._call = core._channel.segregated_call(
            cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS,
            _METHOD.encode(),
            None,
            None,
            metadata,
            None,
            ((begin, None), (first, None)),
            cygrpc.build_census_context(),
            None,
        )

    def put(self, messages: Iterable[bytes]) -> None:
        """See `StreamCall`."""
        sender = self._sender
        if isinstance(messages, list | tuple) and (sender is None or not sender.is_busy):
            self._pending.extend(messages)
            return
        if sender is None:
            self._sender = sender = _Sender(self._start, self.cancel)
        sender.put(messages)

    def half_close(self) -> None:
        """See `StreamCall`."""
        self._start((cygrpc.SendCloseFromClientOperation(_NO_FLAGS),))

    def receive(self) -> bytes:
        """See `StreamCall`."""
        with self._receiving:
            while (message := self._received) is None:
                self._operate()
                if not self._due:
                    self._over()
                self._note(self._call.next_event())
            self._received = None
        if self._closed:
            self._drain()
        return message

    def cancel(self) -> None:
        """See `StreamCall`."""
        self._call.cancel(_CANCELLED, "Locally cancelled by application!")

    def close(self) -> None:
        """See `StreamCall`."""
        self._closed = True
        if self._sender is not None:
            self._sender.close()
        self.cancel()
        self._drain()

    def on_end(self, callback: Callable[[], object]) -> None:
        """See `StreamCall`: there is no such thread."""

    def _operate(self) -> None:
        """Start the next operations: the next message, and with the last one the wish to receive."""
        if self._pending and not self._sends:
            send = cygrpc.SendMessageOperation(self._pending.popleft(), _NO_FLAGS)
            self._sends = True
            if self._pending or self._receives:
                self._start((send,))
                return
            self._receives = True
            self._start((send, cygrpc.ReceiveMessageOperation(_NO_FLAGS)))
        elif not self._receives and not self._pending:
            self._receives = True
            self._start((cygrpc.ReceiveMessageOperation(_NO_FLAGS),))

    def _start(self, operations: tuple[Any, ...]) -> bool:
        """Start operations together; False once the call has ended."""
        with self._lock:
            if started := bool(self._due and self._call.operate(operations, None)):
                self._due += 1
        return started

    def _note(self, event: Any) -> None:
        with self._lock:
            self._due -= 1
        for operation in event.batch_operations:
            kind = operation.type()
            if kind == _RECEIVED:
                self._received, self._receives = operation.message(), False
            elif kind == _SENT:
                self._sends = False
                if self._sender is not None:
                    self._sender.note_sent()
            elif kind == _STATUS:
                self._status = operation

    def _over(self) -> None:
        """Raise the error that the call ended with."""
        status = self._status
        code = _common.CYGRPC_STATUS_CODE_TO_STATUS_CODE.get(status.code(), grpc.StatusCode.UNKNOWN)
        if code is grpc.StatusCode.OK:
            raise StopIteration
        raise _channel._InactiveRpcError(_channel._RPCState((), (), status.trailing_metadata(), code, status.details()))

    def _drain(self) -> None:
        """Receive the last events of a closed call, unless another thread does: the one that receives, at its end."""
        while self._due and self._receiving.acquire(blocking=False):
            try:
                while self._due:
                    self._note(self._call.next_event())
            finally:
                self._receiving.release()


class _Sender:
    """The thread that sends messages while they are made."""

    def __init__(self, start: Callable[[tuple[Any, ...]], bool], cancel: Callable[[], object]) -> None:
        self._start = start
        self._cancel = cancel
        self._sent: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._batches: queue.SimpleQueue[Iterable[bytes] | None] = queue.SimpleQueue()
        self._open = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._work, name="stepwire-sender", daemon=True).start()

    @property
    def is_busy(self) -> bool:
        return self._open > 0

    def put(self, messages: Iterable[bytes]) -> None:
        with self._lock:
            self._open += 1
        self._batches.put(messages)

    def note_sent(self) -> None:
        self._sent.put(True)

    def close(self) -> None:
        self._sent.put(False)
        self._batches.put(None)

    def _work(self) -> None:
        while (batch := self._batches.get()) is not None:
            try:
                for message in batch:
                    if not (self._start((cygrpc.SendMessageOperation(message, _NO_FLAGS),)) and self._sent.get()):
                        return
            except Exception:
                _log.exception("a message could not be made; its step is given up")
                self._cancel()
            del batch
            with self._lock:
                self._open -= 1
