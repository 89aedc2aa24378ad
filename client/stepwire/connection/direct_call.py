"""A stream without threads in between: whoever receives waits for the call's events itself.

It uses the part of gRPC below its streams, as gRPC's own unary calls do. See `calls` for the reason, and for the stream
that takes its place where gRPC has other names there.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import grpc
from grpc import _channel as grpc_channel
from grpc._channel import _InactiveRpcError, _RPCState
from grpc._common import CYGRPC_STATUS_CODE_TO_STATUS_CODE, STATUS_CODE_TO_CYGRPC_STATUS_CODE

from stepwire.connection.calls import ATTACH, Metadata

__all__ = ["DirectCall"]

_log = logging.getLogger("stepwire")
_core: Any = vars(grpc_channel)["cygrpc"]
_Failed: Any = _InactiveRpcError
_NO_FLAGS: Final = 0
_CANCELLED: Final = STATUS_CODE_TO_CYGRPC_STATUS_CODE[grpc.StatusCode.CANCELLED]
_RECEIVED: Final = _core.OperationType.receive_message
_STATUS: Final = _core.OperationType.receive_status_on_client
_SENT: Final = _core.OperationType.send_message


class DirectCall:
    """A stream whose receiver waits for its events itself. One thread receives at a time.

    gRPC destroys the queue of events with the last event, and a wait after that one crashes the process. So `_due`
    counts the events to come, under the lock that operations are started with.
    """

    def __init__(self, channel: grpc.Channel, metadata: Metadata) -> None:
        """Begin the call."""
        self._lock = threading.Lock()
        self._receiving = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._sending = threading.Lock()  # held while a message is on its way: gRPC sends one at a time
        self._receives = self._closed = False
        self._received: bytes | None = None
        self._status: Any = None
        self._sender: _Sender | None = None
        begin = (
            _core.SendInitialMetadataOperation(metadata, _NO_FLAGS),
            _core.ReceiveStatusOnClientOperation(_NO_FLAGS),
        )
        first = (_core.ReceiveInitialMetadataOperation(_NO_FLAGS),)
        self._due = 2
        core: Any = channel
        self._call = core._channel.segregated_call(
            _core.PropagationConstants.GRPC_PROPAGATE_DEFAULTS,
            ATTACH.encode(),
            None,
            None,
            metadata,
            None,
            ((begin, None), (first, None)),
            _core.build_census_context(),
            None,
        )

    def put(self, messages: Iterable[bytes]) -> None:
        """See `StreamCall`."""
        sender = self._sender
        if isinstance(messages, list | tuple) and (sender is None or not sender.is_busy):
            self._pending.extend(messages)
            return
        if sender is None:
            self._sender = sender = _Sender(self._send, self.cancel)
        if self._pending:
            sender.put(tuple(self._pending))
            self._pending.clear()
        sender.put(messages)

    def half_close(self) -> None:
        """See `StreamCall`."""
        self._start((_core.SendCloseFromClientOperation(_NO_FLAGS),))

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
        """Start what can be started: the next message, and behind the last one the wish to receive.

        The two are no single operation. It would fail as a whole where the server replies without reading and ends the
        call, and the reply would be lost.
        """
        if self._pending and self._sending.acquire(blocking=False):
            if not self._start((_core.SendMessageOperation(self._pending.popleft(), _NO_FLAGS),)):
                self._sending.release()
        if not (self._receives or self._pending):
            self._receives = True
            self._start((_core.ReceiveMessageOperation(_NO_FLAGS),))

    def _send(self, message: bytes) -> bool:
        """Send a message when the one before is on the wire; False once the call has ended."""
        self._sending.acquire()
        if not (started := self._start((_core.SendMessageOperation(message, _NO_FLAGS),))):
            self._sending.release()
        return started

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
                self._sending.release()
            elif kind == _STATUS:
                self._status = operation

    def _over(self) -> None:
        """Raise the error that the call ended with."""
        status = self._status
        code = CYGRPC_STATUS_CODE_TO_STATUS_CODE.get(status.code(), grpc.StatusCode.UNKNOWN)
        if code is grpc.StatusCode.OK:
            raise StopIteration
        raise _Failed(_RPCState((), (), status.trailing_metadata(), code, status.details()))

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

    def __init__(self, send: Callable[[bytes], bool], cancel: Callable[[], object]) -> None:
        self._send = send
        self._cancel = cancel
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

    def close(self) -> None:
        self._batches.put(None)

    def _work(self) -> None:
        while (batch := self._batches.get()) is not None:
            try:
                for message in batch:
                    if not self._send(message):
                        return
            except Exception:
                _log.exception("a message could not be made; its step is given up")
                self._cancel()
            del batch
            with self._lock:
                self._open -= 1
