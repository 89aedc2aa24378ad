"""The admission of calls: a token is recognised, and its role compared with the method's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

from stepwire.errors import AuthenticationError, PermissionDeniedError
from stepwire_server.access.client_certificates import ClientCertificate, ClientCertificates
from stepwire_server.access.identity import EVERYBODY, METHODS, OF_ALL_TENANTS, Identity
from stepwire_server.access.signed_tokens import SignedTokens, looks_signed
from stepwire_server.access.tokens import TokenFile

__all__ = ["AccessControl", "Caller"]

_HEALTH: Final = "/grpc.health.v1.Health/"
_BEARER: Final = "bearer "


class Caller(NamedTuple):
    """Whoever makes a call.

    Attributes:
        identity: the identity behind its token.
        certificate: the certificate of its connection; None where none is asked for.
    """

    identity: Identity
    certificate: ClientCertificate | None = None


class AccessControl:
    """Admits calls. Thread-safe.

    Attributes:
        tokens: the file of tokens; None for none. Without it and `signed` every call is admitted.
        signed: the tokens that a key has signed; None for none.
        certificates: the certificates of clients; None where none is asked for.
    """

    def __init__(
        self,
        tokens: TokenFile | None = None,
        *,
        signed: SignedTokens | None = None,
        certificates: ClientCertificates | None = None,
        open_health: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Admit by a file of tokens, by tokens that are signed, and by certificates.

        Args:
            tokens: the file; None for none.
            signed: the tokens that a key has signed; None for none.
            certificates: the certificates of clients; None asks for none.
            open_health: health checks need no token.
            clock: returns seconds since 1970.
        """
        self.tokens = tokens
        self.signed = signed
        self.certificates = certificates
        self._open_health = open_health
        self._clock = clock

    @property
    def controls(self) -> bool:
        """Callers bring something that may expire, or be revoked."""
        return not (self.tokens is None and self.signed is None and self.certificates is None)

    def admit(self, method: str, authorization: str | None, certificate: bytes | None = None) -> Identity:
        """Return the identity behind a call that may be made.

        Args:
            method: the full name of the method.
            authorization: the metadata of this name; None for none.
            certificate: that of the connection, PEM; None for none, as over a Unix socket.

        Raises:
            AuthenticationError: there is no token, an unknown one, or an expired one; or the certificate counts no
                longer.
            PermissionDeniedError: the role of the token may not call the method, or its tenant may not.
        """
        self._certificate(certificate)
        if self._open_health and method.startswith(_HEALTH):
            return EVERYBODY
        identity = self.identify(authorization)
        _permit(identity, method)
        return identity

    def identify(self, authorization: str | None) -> Identity:
        """Return the identity behind a token.

        Raises:
            AuthenticationError: as `admit`.
        """
        return EVERYBODY if self.tokens is None and self.signed is None else self._recognised(authorization)

    def bearer(self, authorization: str | None) -> str:
        """Return the token in the metadata of a call that was admitted; empty where none is asked for."""
        if self.tokens is None and self.signed is None:
            return ""
        return (authorization or "")[len(_BEARER) :].strip()

    def on_change(self, tell: Callable[[], object]) -> None:
        """Call a function after tokens, keys or authorities have changed."""
        for each in (self.tokens, self.signed, self.certificates):
            if each is not None:
                each.on_change(tell)

    def look(self) -> None:
        """Read the tokens, keys and authorities again, if their files have changed."""
        for each in (self.tokens, self.signed, self.certificates):
            if each is not None:
                each.look()

    def caller(self, authorization: str | None, certificate: bytes | None = None) -> Caller:
        """Return whoever makes a call, for `check`; the arguments are those of `admit`.

        Raises:
            AuthenticationError: as `admit`.
        """
        return Caller(self.identify(authorization), self._certificate(certificate))

    def check(self, caller: Caller) -> None:
        """Refuse a caller that was admitted before, and has expired or was revoked since.

        Raises:
            AuthenticationError: it has.
        """
        if caller.certificate is not None and self.certificates is not None:
            self.certificates.check(caller.certificate)
        self._check(caller.identity)

    def _check(self, identity: Identity) -> None:
        if identity.expires <= self._clock():
            raise AuthenticationError(
                f"the token {identity.name!r} has expired; attach with a new one",
                metadata={"token": identity.name},
            )
        if self.tokens is not None and identity.digest and not self.tokens.knows(identity):
            raise AuthenticationError(
                f"the token {identity.name!r} was revoked; attach with another one", metadata={"token": identity.name}
            )
        if self.signed is not None and identity.key and not self.signed.knows(identity):
            raise AuthenticationError(
                f"the key that has signed the token {identity.name!r} was replaced; attach with a new token",
                metadata={"token": identity.name},
            )

    def _recognised(self, authorization: str | None) -> Identity:
        if not authorization:
            raise AuthenticationError(
                "this server needs a token: give one by connect(token=…), STEPWIRE_TOKEN or STEPWIRE_TOKEN_FILE"
            )
        if not authorization.lower().startswith(_BEARER):
            raise AuthenticationError("the metadata `authorization` is not `Bearer TOKEN`")
        identity = self._found(self.bearer(authorization))
        if identity is None:
            raise AuthenticationError("the token is unknown here; ask the server's operator for another one")
        self._check(identity)
        return identity

    def _found(self, token: str) -> Identity | None:
        if self.signed is not None and looks_signed(token):
            return self.signed.find(token)
        return None if self.tokens is None else self.tokens.find(token)

    def _certificate(self, certificate: bytes | None) -> ClientCertificate | None:
        if certificate is None or self.certificates is None:
            return None
        return self.certificates.admit(certificate)


def _permit(identity: Identity, method: str) -> None:
    """Refuse a method that is not for a role, or not for one tenant.

    Raises:
        PermissionDeniedError: it is not for this identity.
    """
    roles = METHODS.get(method, frozenset())
    if identity.role not in roles:
        raise PermissionDeniedError(
            f"the token {identity.name!r} has the role {identity.role}, which may not call {method}; use a token "
            f"with one of the roles {', '.join(sorted(roles)) or 'that nobody has'}",
            metadata={"method": method, "role": identity.role},
        )
    if identity.tenant and method in OF_ALL_TENANTS:
        raise PermissionDeniedError(
            f"the token {identity.name!r} is of the tenant {identity.tenant!r}, and {method} is of all tenants; use "
            "a token without a tenant",
            metadata={"method": method, "role": identity.role},
        )
