"""Connections without sockets: a client's calls run a server's handlers themselves, and break where a test says.

A line stands in for gRPC's channel. It knows two faults. A line that loses messages breaks at the n-th message of an
operation, in either direction, and the server notices. A line with late messages breaks at the client's n-th wait. The
server notices nothing, and what the client had sent reaches it when the test says, as a delayed packet does.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple, NoReturn

import grpc
import pytest

import stepwire
from stepwire.connection import stream
from stepwire.v1 import transport_pb2
from stepwire_server.access.control import AccessControl
from stepwire_server.config import ServerConfig
from stepwire_server.rpc.drain import Drain
from stepwire_server.rpc.interceptor import ErrorInterceptor
from stepwire_server.rpc.servicer import OptimizerService
from stepwire_server.rpc.serving import Serving
from stepwire_server.sessions.registry import Registry
from stepwire_server.sessions.registry_limits import RegistryLimits
from stepwire_server.sharing.offer import Sharing
from tests.support.numpy_server import numpy_pool

__all__ = ["CHUNK_BYTES", "Clock", "Fault", "Line", "LineServer", "Status", "connected"]

CHUNK_BYTES = 4096
_FAULTY = ("Attach", "Step", "Load")


class Clock:
    """A clock that goes on when a client pauses."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let seconds pass."""
        self.now += seconds


class Fault(NamedTuple):
    """The fault of a line during one operation.

    Attributes:
        after: the messages, or with `late` the waits of the client, before the line breaks; None for no fault.
        late: the messages of the client reach the server later.
        arrives: with `late`, the most messages that do.
        dead: the line stays broken, so that the operation fails; else the client connects anew.
    """

    after: int | None = None
    late: bool = False
    arrives: int = 0
    dead: bool = False


class Status(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """The end of a call with a status; without one, of a connection that broke."""

    def __init__(self, status: Any = None) -> None:
        self._status = status

    def code(self) -> Any:
        return grpc.StatusCode.UNAVAILABLE if self._status is None else self._status.code

    def details(self) -> Any:
        return "the connection broke" if self._status is None else self._status.details

    def trailing_metadata(self) -> Any:
        return () if self._status is None else self._status.trailing_metadata

    def initial_metadata(self) -> Any:
        return ()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> None:
        return None

    def cancel(self) -> bool:
        return False

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return False


class _Cancelled(grpc.RpcError):  # type: ignore[misc]
    """The error of a handler's iterator of requests, once the client is gone."""


class _Inline:
    """An executor that runs in the thread of its caller."""

    def submit(self, call: Callable[..., Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        return future


class _Context:
    """A call, as a handler sees it."""

    def cancel(self) -> None:
        """Nothing waits in another thread."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Nobody waits for others."""
        return True

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> tuple[()]:
        """Nobody has a token."""
        return ()

    def abort_with_status(self, status: Any) -> NoReturn:
        raise Status(status)


class LineServer:
    """The handlers of a server, and its sessions.

    Attributes:
        registry: the sessions.
    """

    def __init__(self, clock: Clock, whole_bytes: int) -> None:
        """Serve with NumPy, in messages of `CHUNK_BYTES`; unary calls and small replies have up to `whole_bytes`."""
        self.pool = numpy_pool()
        self.registry = Registry(self.pool, RegistryLimits(100, 100, 1e9), clock)
        config = ServerConfig(max_chunk_bytes=CHUNK_BYTES, max_lease_seconds=1e9)
        serving = Serving(Drain(), _Inline(), clock, whole_bytes, AccessControl())  # type: ignore[arg-type]
        service = OptimizerService(
            self.registry,
            serving,
            config,
            Sharing(None, dict.fromkeys(transport_pb2.Transport.values(), "off")),
            instance_id=secrets.token_hex(8),
            local=transport_pb2.LocalAccess(),
        )
        self._handlers, self._guard = service.handlers(), ErrorInterceptor()

    def handler(self, method: str) -> Any:
        """Return the handler of a method."""
        details = _Details(method)
        return self._guard.intercept_service(self._handlers.service, details)  # type: ignore[arg-type]

    def close(self) -> None:
        """End the sessions and the devices."""
        self.registry.close()
        self.pool.close()


class _Details(NamedTuple):
    method: str
    invocation_metadata: tuple[()] = ()


class Line:
    """A channel to a server, for one client, with the messages that have not reached the server yet."""

    def __init__(self, server: LineServer) -> None:
        self._server = server
        self._late: list[Callable[[], None]] = []
        self.arm(Fault())

    def arm(self, fault: Fault) -> None:
        """Begin an operation with a fault."""
        self._fault, self._left, self._is_dead = fault, fault.after, False

    def deliver(self) -> bool:
        """Let the oldest late messages reach the server; False without any."""
        if self._late:
            self._late.pop(0)()
            return True
        return False

    def close(self) -> None:
        """Drop what is late."""
        self._late.clear()

    # --- faults -------------------------------------------------------------------------------------------

    def passes(self) -> bool:
        """Tell whether a message passes; False where the line breaks."""
        return not self._breaks(late=False)

    def is_late(self) -> bool:
        """Tell whether the line breaks at this wait of the client, and its messages are late."""
        return self._breaks(late=True)

    def keep(self, deliver: Callable[[list[bytes]], None], messages: list[bytes]) -> None:
        """Keep the messages that arrive later."""
        arriving = messages[: self._fault.arrives]
        self._late.append(lambda: deliver(arriving))

    def _breaks(self, *, late: bool) -> bool:
        if self._is_dead:
            return not late
        if self._left is None or self._fault.late is not late:
            return False
        self._left -= 1
        if self._left >= 0:
            return False
        self._left, self._is_dead = None, self._fault.dead
        return True

    # --- the interface of a channel -----------------------------------------------------------------------

    def unary_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        behavior, faulty = self._server.handler(method).unary_unary, method.endswith(_FAULTY)

        def call(data: bytes) -> Any:
            def run(requests: Iterator[bytes]) -> Any:
                for request in requests:
                    return behavior(request, _Context())

            reply = self._exchange([data], run) if faulty else run(iter([data]))
            return reply if response_deserializer is None else response_deserializer(reply)

        return _Method(call)

    def unary_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        behavior = self._server.handler(method).unary_stream
        return lambda data, timeout=None, metadata=(): _Replies(behavior(data, _Context()))

    def stream_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        handler = self._server.handler(method)

        def call(messages: Iterable[bytes]) -> Any:
            reply = self._exchange(list(messages), lambda requests: handler.stream_unary(requests, _Context()))
            data = handler.response_serializer(reply)
            return data if response_deserializer is None else response_deserializer(data)

        return _Method(call)

    def stream_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        behavior = self._server.handler(method).stream_stream
        return lambda outbox, metadata=(): _Stream(self, behavior, outbox)

    def _exchange(self, messages: list[bytes], run: Callable[[Iterator[bytes]], Any]) -> Any:
        """Make a call of one reply."""
        if self.is_late():
            self.keep(lambda arriving: _quietly(lambda: run(_until_cancelled(arriving, len(messages)))), messages)
            raise Status()
        try:
            reply = run(self.crossing(iter(messages)))
        except _Cancelled:
            raise Status() from None
        if not self.passes():
            raise Status()
        return reply

    def crossing(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Pass messages to a handler, until the line breaks."""
        for message in messages:
            if not self.passes():
                raise _Cancelled
            yield message


class _Method:
    """A method of one reply."""

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self._call = call

    def __call__(self, request: Any, timeout: float | None = None, metadata: Any = ()) -> Any:
        return self._call(request)

    def future(self, request: Any, timeout: float | None = None, metadata: Any = ()) -> Future[Any]:
        return _Inline().submit(lambda: self._call(request))


class _Replies:
    """The replies of a call without faults."""

    def __init__(self, replies: Iterator[bytes]) -> None:
        self._replies = replies

    def __iter__(self) -> Iterator[bytes]:
        return self._replies

    def cancel(self) -> None:
        """Nothing goes on."""


class _Asleep:
    """A watchdog that never barks: the seconds of a deadline are those of the clock, not of a loaded machine."""

    barked = False

    def __init__(self, bark: Callable[[], object]) -> None:
        pass

    def arm(self, seconds: float) -> None:
        pass

    def disarm(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Requests(Iterator[bytes]):
    """The requests of a stream, as its handler reads them."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self.source = source

    def __next__(self) -> bytes:
        return next(self.source)


class _Stream:
    """An attached stream: the handler goes on whenever its client waits for a reply."""

    def __init__(self, line: Line, behavior: Callable[..., Any], outbox: Iterator[bytes]) -> None:
        self._line = line
        self._outbox = outbox
        self._requests = _Requests(line.crossing(outbox))
        self._replies = behavior(self._requests, _Context())
        self._callbacks: list[Callable[[], None]] = []
        self._is_over = self._is_late = self._kept = False

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> bytes:
        if self._is_over:
            raise Status()
        if self._line.is_late():
            self._is_late = True
            self._end()
            raise Status()
        try:
            reply: bytes = next(self._replies)
        except (Status, StopIteration):
            self._end()
            raise
        except _Cancelled:
            self._end()
            raise Status() from None
        if not self._line.passes():
            self.cancel()
            raise Status()
        return reply

    def cancel(self) -> bool:
        """End the call. If its messages are late, all that were sent by now arrive later."""
        self._end()
        if self._is_late:
            self._is_late, self._kept = False, True
            self._line.keep(self._deliver, list(self._outbox))
        elif not self._kept:
            self._replies.close()
        return True

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Call a function at the end."""
        self._callbacks.append(callback)
        return not self._is_over

    def _end(self) -> None:
        self._is_over = True
        while self._callbacks:
            self._callbacks.pop()()

    def _deliver(self, messages: list[bytes]) -> None:
        self._requests.source = _until_cancelled(messages, len(messages) + 1)
        _quietly(lambda: list(self._replies))
        self._replies.close()


def _until_cancelled(messages: list[bytes], count: int) -> Iterator[bytes]:
    """Yield messages to a handler; if there are fewer than `count`, its client is gone then."""
    yield from messages
    if len(messages) < count:
        raise _Cancelled


def _quietly(call: Callable[[], object]) -> None:
    """Make a call whose client is gone."""
    with contextlib.suppress(Status, StopIteration, _Cancelled):
        call()


@contextlib.contextmanager
def connected(server: LineServer, clock: Clock, shards: int) -> Iterator[tuple[stepwire.Client, list[Line]]]:
    """Connect a client over a line a shard."""
    lines: list[Line] = []

    def opened(target: str, options: Any = None) -> Line:
        lines.append(Line(server))
        return lines[-1]

    retry = stepwire.Retry(clock=clock, sleep=clock.advance, uniform=lambda low, high: high)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grpc, "insecure_channel", opened)
        client = stepwire.connect("127.0.0.1:1", transport="tcp", channels=shards, timeout=5.0, retry=retry)
    with pytest.MonkeyPatch.context() as patched, client:
        patched.setattr(stream, "Watchdog", _Asleep)
        yield client, lines
