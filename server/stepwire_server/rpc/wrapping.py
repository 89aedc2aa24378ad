"""A handler of gRPC around another one's behaviour, of the same kind and with the same serializers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import grpc

__all__ = ["Behavior", "Handler", "kinds_of", "wrapped"]

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behavior: TypeAlias = Callable[[Any, grpc.ServicerContext], Any]
"""The function that serves a call: with a response, or with an iterator of them."""


def wrapped(
    handler: Any,
    call: Callable[[Behavior], Behavior],
    stream: Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]],
) -> Handler:
    """Return a handler whose behaviour is another one.

    Args:
        handler: the handler.
        call: makes the behaviour of a method of one response, from the handler's.
        stream: makes the behaviour of a method of many responses, likewise.
    """
    name = "_".join(kinds_of(handler))
    make = getattr(grpc, f"{name}_rpc_method_handler")
    behavior = (stream if handler.response_streaming else call)(getattr(handler, name))
    made: Handler = make(
        behavior, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
    )
    return made


def kinds_of(handler: Any) -> tuple[str, str]:
    """Return the kinds of a handler's requests and responses, each `unary` or `stream`, as gRPC names them."""
    return (
        "stream" if handler.request_streaming else "unary",
        "stream" if handler.response_streaming else "unary",
    )
