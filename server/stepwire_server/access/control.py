"""The admission of calls: a token is recognised, and its role compared with the method's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from stepwire.errors import AuthenticationError, PermissionDeniedError
from stepwire_server.access.identity import EVERYBODY, METHODS, Identity
from stepwire_server.access.tokens import TokenFile

__all__ = ["AccessControl"]

_HEALTH: Final = "/grpc.health.v1.Health/"
_BEARER: Final = "bearer "


class AccessControl:
    """Admits calls. Thread-safe.

    Attributes:
        tokens: the file of tokens; None where every call is admitted.
    """

    def __init__(
        self, tokens: TokenFile | None = None, *, open_health: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        """Admit by a file of tokens.

        Args:
            tokens: the file; None admits every call.
            open_health: health checks need no token.
            clock: returns seconds since 1970.
        """
        self.tokens = tokens
        self._open_health = open_health
        self._clock = clock

    def admit(self, method: str, authorization: str | None) -> Identity:
        """Return the identity behind a call that may be made.

        Args:
            method: the full name of the method.
            authorization: the metadata of this name; None for none.

        Raises:
            AuthenticationError: there is no token, an unknown one, or an expired one.
            PermissionDeniedError: the role of the token may not call the method.
        """
        roles = METHODS.get(method, frozenset())
        if self._open_health and method.startswith(_HEALTH):
            return EVERYBODY
        identity = self.identify(authorization)
        if identity.role not in roles:
            raise PermissionDeniedError(
                f"the token {identity.name!r} has the role {identity.role}, which may not call {method}; use a token "
                f"with one of the roles {', '.join(sorted(roles)) or 'that nobody has'}",
                metadata={"method": method, "role": identity.role},
            )
        return identity

    def identify(self, authorization: str | None) -> Identity:
        """Return the identity behind a token.

        Raises:
            AuthenticationError: as `admit`.
        """
        return EVERYBODY if self.tokens is None else self._recognised(self.tokens, authorization)

    def on_change(self, tell: Callable[[], object]) -> None:
        """Call a function after tokens have changed."""
        if self.tokens is not None:
            self.tokens.on_change(tell)

    def look(self) -> None:
        """Read the tokens again, if their file has changed."""
        if self.tokens is not None:
            self.tokens.look()

    def check(self, identity: Identity) -> None:
        """Refuse an identity that was admitted before, and has expired or was revoked since.

        Raises:
            AuthenticationError: it has.
        """
        if identity.expires <= self._clock():
            raise AuthenticationError(
                f"the token {identity.name!r} has expired; attach with a new one",
                metadata={"token": identity.name},
            )
        if self.tokens is not None and identity.digest and not self.tokens.knows(identity):
            raise AuthenticationError(
                f"the token {identity.name!r} was revoked; attach with another one", metadata={"token": identity.name}
            )

    def _recognised(self, tokens: TokenFile, authorization: str | None) -> Identity:
        if not authorization:
            raise AuthenticationError(
                "this server needs a token: give one by connect(token=…), STEPWIRE_TOKEN or STEPWIRE_TOKEN_FILE"
            )
        if not authorization.lower().startswith(_BEARER):
            raise AuthenticationError("the metadata `authorization` is not `Bearer TOKEN`")
        identity = tokens.find(authorization[len(_BEARER) :].strip())
        if identity is None:
            raise AuthenticationError("the token is unknown here; ask the server's operator for another one")
        self.check(identity)
        return identity
