"""The one boundary where errors become statuses.

Every error of the server passes here. The table gives a `StepwireError` its status. Any other error becomes INTERNAL
with an opaque id, and its text goes to the log alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, NoReturn, cast

import grpc
import structlog

from stepwire.errors import Reason, ServerError, StepwireError
from stepwire.wire.error_details import status_of
from stepwire_server.observability.bounded_lines import BoundedLines
from stepwire_server.rpc.wrapping import Handler, wrapped

__all__ = ["ErrorInterceptor"]

_log = structlog.get_logger()
_refusals: Final = BoundedLines(lambda event, **values: _log.info(event, **values))


class ErrorInterceptor(grpc.ServerInterceptor):
    """Wraps every method of the server, so that errors leave as statuses."""

    def __init__(
        self,
        refused: Callable[[StepwireError], object] = lambda error: None,
        told: Callable[[StepwireError], StepwireError] = lambda error: error,
    ) -> None:
        """Guard the methods.

        Args:
            refused: is told of each error that leaves.
            told: returns the error that may be told in the place of another one.
        """
        self._errors = _Errors(refused, told)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler that the server would use."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        return wrapped(
            handler,
            lambda behavior: _guarded_call(behavior, method, self._errors),
            lambda behavior: _guarded_stream(behavior, method, self._errors),
        )


class _Errors(NamedTuple):
    refused: Callable[[StepwireError], object]
    told: Callable[[StepwireError], StepwireError]


def _guarded_call(behavior: Callable[..., Any], method: str, errors: _Errors) -> Callable[..., Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return behavior(request, context)
        except Exception as error:
            _abort(error, context, method, errors)

    return call


def _guarded_stream(
    behavior: Callable[..., Iterator[Any]], method: str, errors: _Errors
) -> Callable[..., Iterator[Any]]:
    def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from behavior(request, context)
        except Exception as error:
            _abort(error, context, method, errors)

    return stream


def _abort(error: Exception, context: grpc.ServicerContext, method: str, errors: _Errors) -> NoReturn:
    # When the client is gone, gRPC raises its own error out of the request iterator and recognizes it here; nobody is
    # left to be told. Every other error is told to gRPC as a status, because gRPC logs the trace of a raised error.
    if isinstance(error, grpc.RpcError):
        # gRPC keeps its error with the state of the call, on which the frames of the trace depend: without a trace
        # there is no cycle, and the memory of a stream goes at once.
        raise error.with_traceback(None)
    if not isinstance(error, StepwireError):
        error = _unexpected(error, method)
    error = errors.told(error)
    errors.refused(error)
    _refusals.write("call refused", method=method, reason=str(error.reason), error=str(error))
    context.abort_with_status(cast(grpc.Status, status_of(error)))


def _unexpected(error: Exception, method: str) -> ServerError:
    incident = secrets.token_hex(8)
    _log.error("unexpected error", method=method, incident=incident, exc_info=error)
    return ServerError(
        f"internal error {incident}; the server's log explains it",
        reason=Reason.INTERNAL,
        metadata={"incident": incident},
    )
