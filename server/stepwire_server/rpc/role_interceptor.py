"""The boundary of roles: a server that has no sessions to tell of refuses every call about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from stepwire_server.rpc.wrapping import Behavior, Handler, wrapped

__all__ = ["RoleInterceptor"]


class RoleInterceptor(grpc.ServerInterceptor):
    """Wraps every method, so that a standby, and a primary that was deposed, say who they are."""

    def __init__(self, admit: Callable[[str], object]) -> None:
        """Ask `admit` before each call, by the name of its method; it raises what the caller is told."""
        self._admit = admit

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler that the server would use."""
        handler, method = continuation(handler_call_details), handler_call_details.method
        if handler is None:
            return None

        def call(behavior: Behavior) -> Behavior:
            def admitted_call(request: Any, context: grpc.ServicerContext) -> Any:
                self._admit(method)
                return behavior(request, context)

            return admitted_call

        def stream(behavior: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
            def admitted_stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                self._admit(method)
                yield from behavior(request, context)

            return admitted_stream

        return wrapped(handler, call, stream)
