"""Calls with their statuses, those of clients that left in the middle too."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from stepwire_server.observability.tallies import Tallies
from stepwire_server.rpc.counting import CountingInterceptor

METHOD = ("server_stream", "a.Service", "Watch")


class Context:
    """A call as its handler sees it."""

    def __init__(self, code: grpc.StatusCode | None = None, *, active: bool = True) -> None:
        self._code, self._active = code, active

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def is_active(self) -> bool:
        return self._active


def handled(tallies: Tallies, behavior: Any, *, streams: bool) -> Any:
    """Return a behaviour as the interceptor wraps it, on a clock that moves a second with each look."""
    readings = iter(range(100))
    interceptor = CountingInterceptor(tallies, lambda: float(next(readings)))
    make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
    details: Any = types.SimpleNamespace(method="/a.Service/Watch")
    handler: Any = interceptor.intercept_service(lambda _: make(behavior), details)
    return handler.unary_stream if streams else handler.unary_unary


def test_a_call_is_counted_with_its_time() -> None:
    tallies = Tallies()
    assert handled(tallies, lambda request, context: request + b"!", streams=False)(b"a", Context()) == b"a!"
    total, method = tallies.total(), ("unary", *METHOD[1:])
    assert (total.started, total.handled) == ({method: 1}, {(*method, "OK"): 1})
    assert total.handling[method].total == 1.0


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (grpc.StatusCode.NOT_FOUND, "NotFound"),
        (grpc.StatusCode.CANCELLED, "Canceled"),
        (grpc.StatusCode.DATA_LOSS, "DataLoss"),
    ],
)
def test_a_refused_call_has_its_status(code: grpc.StatusCode, name: str) -> None:
    def refuse(request: bytes, context: Any) -> bytes:
        raise RuntimeError("as `context.abort` does")

    tallies = Tallies()
    with pytest.raises(RuntimeError):
        handled(tallies, refuse, streams=False)(b"", Context(code))
    assert tallies.total().handled == {("unary", *METHOD[1:], name): 1}


def test_a_stream_lasts_until_its_last_message_and_one_that_is_left_is_cancelled() -> None:
    def watch(request: bytes, context: Any) -> Iterator[bytes]:
        yield from (b"1", b"2")

    tallies = Tallies()
    watched = handled(tallies, watch, streams=True)
    assert list(watched(b"", Context())) == [b"1", b"2"]
    left = watched(b"", Context(active=False))
    assert next(left) == b"1"
    left.close()
    total = tallies.total()
    assert total.started == {METHOD: 2}
    assert total.handled == {(*METHOD, "OK"): 1, (*METHOD, "Canceled"): 1}
