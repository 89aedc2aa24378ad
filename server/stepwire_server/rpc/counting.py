"""Calls, counted: every method of the server, health included, with its status and its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pool

from stepwire_server.observability.tallies import Tallies
from stepwire_server.rpc.wrapping import Behavior, Handler, wrapped

__all__ = ["CountingInterceptor"]

_KINDS: Final = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}


def _kind(service: str, name: str, handler: Any) -> str:
    """Name the kind of a method as the contract has it; a handler may take a method of one request as a stream."""
    try:
        method: Any = descriptor_pool.Default().FindServiceByName(service).FindMethodByName(name)
    except KeyError:
        return _KINDS[handler.request_streaming, handler.response_streaming]
    return _KINDS[method.client_streaming, method.server_streaming]


class CountingInterceptor(grpc.ServerInterceptor):
    """Wraps every method; outside of the interceptor that turns errors into statuses, which it counts."""

    def __init__(self, tallies: Tallies, clock: Callable[[], float]) -> None:
        """Count in `tallies`; `clock` returns seconds."""
        self._tallies = tallies
        self._clock = clock

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler that the server would use."""
        handler: Any = continuation(handler_call_details)
        if handler is None:
            return None
        _, service, name = handler_call_details.method.split("/")
        method = (_kind(service, name, handler), service, name)
        return wrapped(handler, lambda behavior: self._call(behavior, method), lambda each: self._stream(each, method))

    def _call(self, behavior: Behavior, method: tuple[str, str, str]) -> Behavior:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            began = self._clock()
            self._tallies.call_started(method)
            try:
                return behavior(request, context)
            finally:
                self._tallies.call_handled(method, _code(context, ended=True), self._clock() - began)

        return call

    def _stream(
        self, behavior: Callable[..., Iterator[Any]], method: tuple[str, str, str]
    ) -> Callable[..., Iterator[Any]]:
        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            began, ended = self._clock(), False
            self._tallies.call_started(method)
            try:
                yield from behavior(request, context)
                ended = True
            finally:
                self._tallies.call_handled(method, _code(context, ended=ended), self._clock() - began)

        return stream


def _code(context: Any, *, ended: bool) -> str:
    """Name the status of a call as gRPC's other servers do, such as "OK" or "NotFound".

    Args:
        context: the context of the call.
        ended: the handler came to its end; else its client has left, unless the status is known.
    """
    code = context.code()
    if code is None:
        return "OK" if ended and context.is_active() else "Canceled"
    name = str(getattr(code, "name", "UNKNOWN"))
    return _SPELLED.get(name, "".join(word.capitalize() for word in name.split("_")))


_SPELLED: Final = {"OK": "OK", "CANCELLED": "Canceled"}
