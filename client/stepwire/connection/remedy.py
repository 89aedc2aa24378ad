"""The next action after no connection was made, beside gRPC's own account of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Final

from stepwire.errors import AuthenticationError, Reason, StepwireError, UnavailableError
from stepwire.wire.addresses import is_on_this_host

__all__ = ["PROXIES", "with_remedy"]

PROXIES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
"""The variables that name a proxy to gRPC, in gRPC's order."""

# The words of OpenSSL in gRPC's account, and for each the cause with its remedy.
_HANDSHAKES: Final = {
    "WRONG_VERSION_NUMBER": "the server speaks plaintext; connect without tls, or start it with --tls-cert",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not signed by an authority that this client trusts, has "
    "expired, or is of another host; give the authority's file by tls=stepwire.TLS(ca=…)",
    "Hostname Verification Check failed": "the server's certificate is of another host; use a name that is in it",
    "CERTIFICATE_REQUIRED": "the server asks for a client's certificate; give tls=stepwire.TLS(cert=…, key=…)",
    "UNKNOWN_CA": "the server does not trust the authority of this client's certificate",
    "Ssl handshake failed": "see gRPC's account",
}
_NO_CONNECTION: Final = ("failed to connect", "errors resolving", "DNS resolution failed")


# gRPC's account of a connection that was closed before it was one.
_CLOSED: Final = ("socket closed", "connection reset", "broken pipe", "endpoint closing", "transport closed")


def with_remedy(
    error: StepwireError,
    target: str,
    environment: Mapping[str, str] = os.environ,
    look: Callable[[], str | None] = lambda: None,
) -> StepwireError:
    """Return an error that names the target and the next action, if gRPC made no connection; else the error itself.

    Args:
        error: the error of a call.
        target: the target of its channel.
        environment: the variables, which may name a proxy.
        look: tells why the server refuses a handshake that gRPC has no reason for, with the remedy; None for no reason.
    """
    if error.reason is not Reason.UNREACHABLE or not str(error).startswith(_NO_CONNECTION):
        return error
    cause = _handshake_problem(str(error))
    if cause is None and (_is_closed(str(error)) or is_on_this_host(target)):
        cause = look()
    if cause is not None:
        return AuthenticationError(
            f"the TLS handshake with {target!r} failed: {cause}. {error}",
            metadata=error.metadata | {"handshake": "failed"},
        )
    remedy = "start a server there with `stepwire serve`, or give the address of one that runs, or tls=True for TLS"
    proxy = next((name for name in PROXIES if environment.get(name)), None)
    if proxy is not None and not is_on_this_host(target):
        remedy += f". The environment names a proxy in {proxy}: a host in no_proxy is reached without it"
    return UnavailableError(f"no server answers at {target!r}: {remedy}. {error}", metadata=error.metadata)


def _is_closed(account: str) -> bool:
    return any(sign in account.lower() for sign in _CLOSED)


def _handshake_problem(account: str) -> str | None:
    """Return the cause of a failed handshake, with its remedy; None for another failure."""
    return next((cause for sign, cause in _HANDSHAKES.items() if sign.lower() in account.lower()), None)
