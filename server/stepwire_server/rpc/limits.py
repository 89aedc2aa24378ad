"""The boundary where calls take their places: every method of the server, health included, passes here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import grpc

from stepwire.errors import InvalidRequestError, Reason
from stepwire_server.access.control import AccessControl
from stepwire_server.access.identity import EVERYBODY, Role
from stepwire_server.rpc.access import identity_of
from stepwire_server.rpc.call_rooms import CALLS, ENTRANCE, FOLLOW, HEALTH, STREAMS, WATCH, CallRooms, ClientCall
from stepwire_server.rpc.end_call import end_call
from stepwire_server.rpc.wrapping import Behavior, Handler, kinds_of

__all__ = ["CallLimits"]

_T = TypeVar("_T")

_ROOMS: Final = {
    "/grpc.health.v1.Health/Check": HEALTH,
    "/grpc.health.v1.Health/Watch": WATCH,
    "/stepwire.v1.OptimizerService/Attach": STREAMS,
    "/stepwire.v1.ReplicationService/Follow": FOLLOW,
}
"""The rooms of methods; of all others it is `CALLS`, by way of `ENTRANCE`."""


class CallLimits(grpc.ServerInterceptor):
    """Wraps every method, so that no call holds a place while it waits for its client.

    A method of one request is served as one of a stream of requests. So its call is counted before its message is
    there, which gRPC would wait for in a thread without end.
    """

    def __init__(self, rooms: CallRooms, access: AccessControl) -> None:
        """Count calls in `rooms`; `access` tells administrators from others."""
        self._rooms = rooms
        self._access = access

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler that the server would use."""
        handler: Any = continuation(handler_call_details)
        if handler is None:
            return None
        room = _ROOMS.get(handler_call_details.method, CALLS)
        requests, responses = kinds_of(handler)
        behavior = getattr(handler, f"{requests}_{responses}")
        if not handler.request_streaming:
            behavior = _of_one_message(behavior)
        serve = self._many if handler.response_streaming else self._one
        make = getattr(grpc, f"stream_{responses}_rpc_method_handler")
        made: Handler = make(
            serve(behavior, room),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return made

    def _one(self, behavior: Behavior, room: str) -> Behavior:
        """Serve a method of one response, which gRPC may keep for long after the handler has returned it."""

        def serve(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
            call = self._enter(context, room)
            try:
                response = behavior(self._received(call, messages, context, room), context)
            except BaseException:
                self._rooms.leave(call)
                raise
            self._rooms.replied(call, len(response) if isinstance(response, bytes) else 0)
            if not context.add_callback(functools.partial(self._rooms.leave, call)):
                self._rooms.leave(call)
            return response

        return serve

    def _many(self, behavior: Callable[..., Iterator[Any]], room: str) -> Callable[..., Iterator[Any]]:
        """Serve a method of many responses; gRPC asks for the next one when it has taken the one before."""

        def serve(messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            call = self._enter(context, room)
            try:
                for response in behavior(self._received(call, messages, context, room), context):
                    self._rooms.wait(call)
                    yield response
                    call.waits = False
            finally:
                self._rooms.leave(call)

        return serve

    def _enter(self, context: grpc.ServicerContext, room: str) -> ClientCall:
        end = functools.partial(end_call, context)
        if room != CALLS:
            return self._rooms.enter(context.peer(), room, end, context.cancel)
        identity = identity_of(context, self._access)
        call = self._rooms.enter(context.peer(), ENTRANCE, end, context.cancel)
        call.tenant = None if identity is EVERYBODY else identity.tenant
        return call

    def _received(
        self, call: ClientCall, messages: Iterator[_T], context: grpc.ServicerContext, room: str
    ) -> Iterator[_T]:
        """Return the messages of a call. Streams watch over theirs themselves: between steps they may be silent."""
        if room == STREAMS:
            return messages
        if room == FOLLOW:
            return self._opened(call, messages)
        return _Received(self._rooms, call, messages, room, functools.partial(self._is_administrator, context))

    def _opened(self, call: ClientCall, messages: Iterator[_T]) -> Iterator[_T]:
        """Iterate over the messages of a standby, which may be silent for as long as it likes once it has opened."""
        self._rooms.wait(call, receives=True)
        first = next(messages, None)
        call.waits = call.receives = False
        if first is not None:
            yield first
            yield from messages

    def _is_administrator(self, context: grpc.ServicerContext) -> bool:
        identity = identity_of(context, self._access)
        return identity is not EVERYBODY and identity.role is Role.ADMIN and not identity.tenant


class _Received(Iterator[_T]):
    """An iterator that keeps no message: a message holds megabytes. An empty one is no sign of life."""

    def __init__(
        self,
        rooms: CallRooms,
        call: ClientCall,
        messages: Iterator[_T],
        room: str,
        is_administrator: Callable[[], bool],
    ) -> None:
        self._rooms = rooms
        self._call = call
        self._messages = messages
        self._room = room
        self._is_administrator = is_administrator
        self._was_empty = False

    def __next__(self) -> _T:
        if self._was_empty:
            self._call.waits = self._call.receives = True
        else:
            self._rooms.wait(self._call, receives=True)
        message = next(self._messages)
        self._call.waits = self._call.receives = False
        self._was_empty = message == b""
        if self._call.room != self._room:
            self._rooms.move(self._call, self._room, self._is_administrator)
        return message


def _of_one_message(behavior: Behavior) -> Behavior:
    """Make a behaviour of one message one of a stream of messages."""

    def serve(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
        for message in messages:
            return behavior(message, context)
        raise InvalidRequestError("the call brought no message; send one", reason=Reason.INVALID_FRAME)

    return serve
