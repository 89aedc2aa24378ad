"""The one boundary where calls are admitted: every method of the server, health included, passes here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc

from stepwire.errors import AuthenticationError
from stepwire_server.access.control import AccessControl, Caller
from stepwire_server.access.identity import Identity
from stepwire_server.rpc.wrapping import Behavior, Handler, wrapped

__all__ = ["AccessInterceptor", "caller_of", "identity_of", "token_of"]

_AUTHORIZATION: Final = "authorization"
"""The name of the metadata that brings a token."""

_CERTIFICATE: Final = "x509_pem_cert"
"""The name of the client's certificate among the properties of a connection. Only TLS has it."""


class AccessInterceptor(grpc.ServerInterceptor):
    """Wraps every method, so that nothing runs before its call is admitted."""

    def __init__(self, access: AccessControl) -> None:
        """Admit by tokens and roles."""
        self._access = access

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler that the server would use."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        return _guarded(handler, handler_call_details.method, self._access)


def identity_of(context: grpc.ServicerContext, access: AccessControl) -> Identity:
    """Return the identity behind a call that was admitted.

    Raises:
        AuthenticationError: it has expired, or was revoked, since.
    """
    return access.identify(_authorization(context))


def token_of(context: grpc.ServicerContext, access: AccessControl) -> str:
    """Return the token that a call which was admitted has brought; empty where the server asks for none."""
    return access.bearer(_authorization(context))


def caller_of(context: grpc.ServicerContext, access: AccessControl) -> Caller:
    """Return whoever makes a call that was admitted.

    Raises:
        AuthenticationError: as `identity_of`.
    """
    return access.caller(_authorization(context), _certificate(context, access))


def _certificate(context: grpc.ServicerContext, access: AccessControl) -> bytes | None:
    if access.certificates is None:
        return None
    found = context.auth_context().get(_CERTIFICATE)
    return bytes(found[0]) if found else None


def _authorization(context: grpc.ServicerContext) -> str | None:
    found = [value for name, value in context.invocation_metadata() or () if name == _AUTHORIZATION]
    if len(found) > 1:
        raise AuthenticationError("the metadata `authorization` came more than once; send one token")
    value = found[0] if found else None
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _guarded(handler: Handler, method: str, access: AccessControl) -> Handler:
    def call(behavior: Behavior) -> Behavior:
        def admitted_call(request: Any, context: grpc.ServicerContext) -> Any:
            access.admit(method, _authorization(context), _certificate(context, access))
            return behavior(request, context)

        return admitted_call

    def stream(behavior: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def admitted_stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            access.admit(method, _authorization(context), _certificate(context, access))
            yield from behavior(request, context)

        return admitted_stream

    return wrapped(handler, call, stream)
