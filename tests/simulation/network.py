"""A network on virtual time: the client's channels, the server's calls, and everything that can happen in between.

A call is two pipes, and each keeps its order, as gRPC over TCP does. Calls overtake one another. A break loses what was
on its way, and each side learns of it at a moment of its own. A unary call may arrive twice, as over a proxy.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple, Protocol

import grpc

from tests.integration.callers.line import Status
from tests.simulation.runtime import Killed, Process, Scheduler, Task

__all__ = ["Channel", "Endpoint", "Network"]

_SECONDS: Final = 0.002
"""The usual time of a message on its way, at most."""
_NOTICE_SECONDS: Final = 0.05


class _Cancelled(grpc.RpcError):  # type: ignore[misc]
    """The error of a handler's iterator of requests, once the client is gone."""


class _Refused(NamedTuple):
    code: Any
    details: str
    trailing_metadata: tuple[()] = ()


class Endpoint(Protocol):
    """A server process as the network knows it.

    Attributes:
        process: the process.
        is_open: it accepts connections.
    """

    process: Process
    is_open: bool

    def handler(self, method: str) -> Any:
        """Return the handler of a method."""

    def heard(self) -> object:
        """Note that a handler has read a message, and return the moment."""

    def tells(self, method: str, heard: object, message: Any) -> None:
        """Check a message that leaves the server; raises AssertionError for one that must not."""

    def refuses(self, method: str, heard: object, status: Status) -> None:
        """Check an error that leaves the server, in the same way."""


class Pipe:
    """One direction of a call."""

    def __init__(self, network: Network, shard: int) -> None:
        self._network, self._shard = network, shard
        self._scheduler = network.scheduler
        self._items: deque[Any] = deque()
        self._reader: Task | None = None
        self._last = 0.0
        self.end: BaseException | None = None
        self.is_cut = False

    def send(self, item: Any) -> None:
        """Send an item; it arrives behind those before."""
        if self.is_cut:
            return
        at = self._network.arrival(self._shard)
        self._last = max(self._last, at)
        self._scheduler.after(self._last - self._scheduler.now, functools.partial(self._arrive, item))

    def get(self, deadline: float | None = None) -> Any:
        """Wait for the next item; raises the end of the pipe, or TimeoutError at a virtual time."""
        while not self._items:
            if self.end is not None:
                raise self.end
            left = None if deadline is None else deadline - self._scheduler.now
            if left is not None and left <= 0:
                raise TimeoutError
            self._reader = self._scheduler.running
            try:
                self._scheduler.block(left)
            finally:
                self._reader = None
        return self._items.popleft()

    def close(self, end: BaseException) -> None:
        """End the pipe now: what has arrived may be read yet."""
        if self.end is None:
            self.end = end
            if self._reader is not None:
                self._scheduler.wake(self._reader)

    def cut(self) -> None:
        """Lose what is sent from now on, and perhaps what is on its way."""
        self.is_cut = True

    def lose(self) -> None:
        """Lose what is on its way."""
        self._shard = -1

    def _arrive(self, item: Any) -> None:
        if self._shard < 0 or self.end is not None:
            return
        self._items.append(item)
        if self._reader is not None:
            self._scheduler.wake(self._reader)


class Call:
    """One call: the requests, the replies, and the context that its handler sees."""

    def __init__(self, network: Network, shard: int, endpoint: Endpoint, method: str) -> None:
        self.network, self.shard, self.endpoint, self.method = network, shard, endpoint, method
        self.requests, self.replies = Pipe(network, shard), Pipe(network, shard)
        self._callbacks: list[Callable[[], None]] = []
        self._on_end: list[Callable[[], None]] = []
        self.is_over = self.is_gone = False
        self._heard: object = None

    # --- the server's side --------------------------------------------------------------------------------

    def received(self) -> Iterator[bytes]:
        """Yield the requests to the handler."""
        while True:
            message = self.requests.get()
            if message is None:
                return
            self._heard = self.endpoint.heard()
            yield message

    def reply(self, message: Any) -> bool:
        """Send a reply, unless the client is gone."""
        if self.is_gone:
            return False
        self.endpoint.tells(self.method, self._heard, message)
        self.replies.send(message)
        return True

    def refuse(self, status: Status) -> None:
        """Send the error of the handler."""
        if not self.is_gone:
            self.endpoint.refuses(self.method, self._heard, status)
        self.replies.send(status)

    def left(self) -> None:
        """Have the handler see that its client is gone."""
        if not self.is_gone:
            self.is_gone = True
            self.requests.close(_Cancelled())
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback()

    def ended(self) -> None:
        """Note the end of the handler."""
        self.is_gone = True
        self._callbacks.clear()

    # --- the context of a handler -------------------------------------------------------------------------

    def cancel(self) -> bool:
        self.replies.send(Status(_Refused(grpc.StatusCode.CANCELLED, "cancelled by the server")))
        self.left()
        return True

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if not self.is_gone:
            self._callbacks.append(callback)
        return not self.is_gone

    def is_active(self) -> bool:
        return not self.is_gone

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def abort_with_status(self, status: Any) -> None:
        raise Status(status)

    def set_code(self, code: Any) -> None:
        """Nobody asks."""

    # --- both ---------------------------------------------------------------------------------------------

    def on_end(self, callback: Callable[[], None]) -> bool:
        """Call a function at the end, as the client sees it."""
        if not self.is_over:
            self._on_end.append(callback)
        return not self.is_over

    def over(self) -> None:
        """Note the end, as the client sees it."""
        if not self.is_over:
            self.is_over = True
            self.network.calls.pop(self, None)
            callbacks, self._on_end = self._on_end, []
            for callback in callbacks:
                callback()

    def break_off(self) -> None:
        """Break the connection: each side learns of it at a moment of its own."""
        scheduler, chance = self.network.scheduler, self.network.scheduler.chance
        for pipe in (self.requests, self.replies):
            pipe.cut()
            if chance.random() < 0.5:
                pipe.lose()
        scheduler.after(chance.uniform(0, _NOTICE_SECONDS), lambda: self.replies.close(Status()))
        scheduler.after(chance.uniform(0, _NOTICE_SECONDS), self.left)


class Network:
    """All calls, and the ways between clients and shards.

    Attributes:
        scheduler: the order of events.
        calls: the calls that are under way.
        route: returns the server process that a new call to a shard reaches; None for none.
    """

    def __init__(self, scheduler: Scheduler, route: Callable[[int], Endpoint | None]) -> None:
        self.scheduler, self.route = scheduler, route
        self.calls: dict[Call, None] = {}
        self._held: dict[int, float] = {}
        self._slow: dict[int, float] = {}
        self._twice: dict[int, int] = {}

    def hold(self, shard: int, seconds: float) -> None:
        """Let nothing arrive, on any way from or to a shard, for some time."""
        self._held[shard] = self.scheduler.now + seconds

    def slow(self, shard: int, seconds: float) -> None:
        """Have messages take long, and differently long, for some time."""
        self._slow[shard] = self.scheduler.now + seconds

    def twice(self, shard: int) -> None:
        """Have the next call of one message arrive twice."""
        self._twice[shard] = self._twice.get(shard, 0) + 1

    def cut(self, shard: int) -> None:
        """Break all connections to a shard."""
        for call in [call for call in self.calls if call.shard == shard]:
            call.break_off()

    def arrival(self, shard: int) -> float:
        """Return the moment at which a message arrives that leaves now."""
        now, chance = self.scheduler.now, self.scheduler.chance
        slow = 100.0 if self._slow.get(shard, 0.0) > now else 1.0
        return max(now, self._held.get(shard, 0.0)) + chance.uniform(0.1, 1.0) * _SECONDS * slow

    def begin(self, shard: int, method: str, kind: str) -> Call:
        """Begin a call.

        Raises:
            Status: nobody listens there.
        """
        endpoint = self.route(shard)
        if endpoint is None or not endpoint.is_open or endpoint.process.dead:
            raise Status()
        call = Call(self, shard, endpoint, method)
        self.calls[call] = None
        self.scheduler.spawn(lambda: self._serve(call, kind), endpoint.process, method)
        return call

    def again(self, call: Call, messages: Iterable[bytes], kind: str) -> None:
        """Have a call of one message arrive once more, if that was asked for."""
        if self._twice.get(call.shard, 0):
            self._twice[call.shard] -= 1
            chance, echo = self.scheduler.chance, Call(self, call.shard, call.endpoint, call.method)
            for message in messages:
                echo.requests.send(message)
            echo.requests.send(None)
            seconds = chance.uniform(0.0, 0.5)
            if not call.endpoint.process.dead:
                self.scheduler.after(
                    seconds,
                    lambda: self.scheduler.spawn(lambda: self._serve(echo, kind), echo.endpoint.process, "echo"),
                )

    def _serve(self, call: Call, kind: str) -> None:
        """Run the handler of a call, in the server's process."""
        try:
            self._run(call, kind)
            call.replies.send(StopIteration())
        except _Cancelled:
            pass
        except Status as refused:
            call.refuse(refused)
        except Killed:
            call.break_off()
            raise
        finally:
            call.ended()

    def _run(self, call: Call, kind: str) -> None:
        handler, requests = call.endpoint.handler(call.method), call.received()
        behaviour = getattr(handler, kind)
        if kind == "stream_unary":
            call.reply(handler.response_serializer(behaviour(requests, call)))
            return
        if kind == "unary_unary":
            call.reply(behaviour(next(requests), call))
            return
        replies = behaviour(requests if kind == "stream_stream" else next(requests), call)
        with contextlib.closing(replies):
            for reply in replies:
                if not call.reply(reply):
                    return


class Channel:
    """A client's channel to one shard."""

    def __init__(self, network: Network, shard: int) -> None:
        self._network, self._shard = network, shard

    def close(self) -> None:
        """Calls end by themselves."""

    def unary_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        return _Method(functools.partial(self._single, method, "unary_unary", response_deserializer))

    def stream_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        return _Method(functools.partial(self._single, method, "stream_unary", response_deserializer))

    def unary_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        def begin(data: bytes, timeout: float | None = None, metadata: Any = ()) -> _Replies:
            call = self._begin(method, "unary_stream")
            if call is not None:
                call.requests.send(data)
                call.requests.send(None)
            return _Replies(self._network, call, timeout)

        return begin

    def stream_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        def begin(outbox: Iterator[bytes], timeout: float | None = None, metadata: Any = ()) -> _Replies:
            call = self._begin(method, "stream_stream")

            def send() -> None:
                for message in outbox:
                    if call is not None and not call.is_over:
                        call.requests.send(message)
                if call is not None:
                    call.requests.send(None)

            self._network.scheduler.spawn(send, name="outbox")
            return _Replies(self._network, call, timeout)

        return begin

    def _begin(self, method: str, kind: str) -> Call | None:
        try:
            return self._network.begin(self._shard, method, kind)
        except Status:
            return None

    def _single(self, method: str, kind: str, decode: Any, messages: Iterable[bytes], timeout: float | None) -> Any:
        sent = list(messages)
        call = self._begin(method, kind)
        replies = _Replies(self._network, call, timeout)
        if call is not None:
            for message in sent:
                call.requests.send(message)
            call.requests.send(None)
            self._network.again(call, sent, kind)
        return _Future(replies, decode)


class _Method:
    """A method of one reply."""

    def __init__(self, begin: Callable[..., Any]) -> None:
        self._begin = begin

    def __call__(self, request: Any, timeout: float | None = None, metadata: Any = ()) -> Any:
        return self.future(request, timeout).result()

    def future(self, request: Any, timeout: float | None = None, metadata: Any = ()) -> Any:
        return self._begin([request] if isinstance(request, bytes) else request, timeout)


class _Replies:
    """The replies of a call, as its client reads them."""

    def __init__(self, network: Network, call: Call | None, timeout: float | None) -> None:
        self._network, self._call = network, call
        self._end = None if timeout is None else network.scheduler.now + timeout
        self._is_cancelled = False

    def __iter__(self) -> _Replies:
        return self

    def __next__(self) -> bytes:
        scheduler, call = self._network.scheduler, self._call
        if call is None:
            scheduler.sleep(scheduler.chance.uniform(0.1, 1.0) * _SECONDS)
            raise Status()
        try:
            item = call.replies.get(self._end)
        except TimeoutError:
            self.cancel()
            raise Status(_Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")) from None
        except Status:
            call.over()
            raise
        if isinstance(item, BaseException):
            call.over()
            raise item
        reply: bytes = item
        return reply

    def cancel(self) -> bool:
        """End the call: the server learns of it later."""
        call, scheduler = self._call, self._network.scheduler
        if call is not None and not self._is_cancelled and not call.is_over:
            self._is_cancelled = True
            call.over()
            call.replies.close(Status(_Refused(grpc.StatusCode.CANCELLED, "cancelled by the client")))
            call.requests.cut()
            scheduler.after(self._network.arrival(call.shard) - scheduler.now, call.left)
        return True

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Call a function at the end."""
        return self._call is not None and self._call.on_end(callback)


class _Future:
    """The reply of a call, once it is there."""

    def __init__(self, replies: _Replies, decode: Any) -> None:
        self._replies, self._decode = replies, decode

    def result(self) -> Any:
        data = next(self._replies)
        with contextlib.suppress(StopIteration):
            next(self._replies)
        return data if self._decode is None else self._decode(data)

    def cancel(self) -> bool:
        return self._replies.cancel()
