"""Unary methods of the service: decode the request, call, encode the response."""

from __future__ import annotations

from typing import Any

import grpc

from stepwire.wire.frames import read_message

__all__ = ["unary"]


def unary(method: Any, request: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """Return the handler of a method.

    Args:
        method: a function of the decoded request and the call's context; it returns the response.
        request: the class of the request.
    """

    def behavior(data: bytes, context: grpc.ServicerContext) -> bytes:
        reply: bytes = method(read_message(request, data), context).SerializeToString()
        return reply

    return grpc.unary_unary_rpc_method_handler(behavior)
