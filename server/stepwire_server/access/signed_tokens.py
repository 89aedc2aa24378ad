"""Tokens that somebody else signs (JWT, RFC 7519): verified once, and known by their digest from then on.

The kind of the key decides the algorithm, and the header of a token has no say in it: a public key never becomes a
secret, and `none` is none of them. A signature costs up to a millisecond and a digest half a microsecond, so a step
that brings a known token costs a look into a table.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import msgspec
import structlog
from msgspec import Meta

from stepwire.errors import AuthenticationError, InvalidRequestError
from stepwire_server.access.identity import Identity, Role
from stepwire_server.access.tokens import digest_of
from stepwire_server.access.watched_files import WatchedFiles, read_owned

if TYPE_CHECKING:
    from jwt.algorithms import AllowedPublicKeys

__all__ = ["SignedTokens", "looks_signed"]

_log = structlog.get_logger()

_MOST_KEY_BYTES: Final = 64 << 10
_MOST_TOKEN_BYTES: Final = 16 << 10
_LEAST_SECRET_BYTES: Final = 32
_LEAST_RSA_BITS: Final = 2048
_MOST_KNOWN: Final = 4096
_DOTS: Final = 2


class _Key(NamedTuple):
    """A key, and the one algorithm that it is for.

    Attributes:
        key: the secret, or the public key.
        algorithm: its name in the header of a token.
        digest: the SHA-256 of the key's file, in hexadecimal digits.
    """

    key: AllowedPublicKeys | bytes
    algorithm: str
    digest: str


class _Claims(msgspec.Struct, frozen=True):
    """The claims that count; a token may have others."""

    sub: Annotated[str, Meta(pattern=r"^[ -~]{1,256}$")]
    role: Role
    exp: Annotated[float, Meta(ge=0, lt=1e15)]
    tenant: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    nbf: float = 0.0


def looks_signed(token: str) -> bool:
    """Tell whether a token has the form of a JWT; a token of `stepwire token create` never has it."""
    return token.count(".") == _DOTS


class SignedTokens:
    """The tokens that a key has signed. Thread-safe."""

    def __init__(
        self, path: pathlib.Path, *, issuer: str = "", audience: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        """Read the key.

        Args:
            path: the file of the key: a public key, PEM, or a secret of 32 bytes or more.
            issuer: the claim `iss` that a token needs; empty for any.
            audience: the claim `aud` that a token needs; empty for tokens without one.
            clock: returns seconds since 1970.

        Raises:
            InvalidRequestError: the file is no such key, or the package PyJWT is missing.
        """
        self._path = path
        self._issuer = issuer or None
        self._audience = audience or None
        self._clock = clock
        self._file = WatchedFiles(path)
        self._key = _read_key(path)
        self._known: dict[str, Identity] = {}
        self._lock = threading.Lock()
        self._on_change: Callable[[], object] = lambda: None

    def on_change(self, tell: Callable[[], object]) -> None:
        """Call a function after the key has changed."""
        self._on_change = tell

    def look(self) -> None:
        """Read the key again if its file has changed. A file that is wrong changes nothing, and is logged."""
        if not self._file.changed():
            return
        try:
            key = _read_key(self._path)
        except InvalidRequestError as problem:
            _log.error("the key of signed tokens stays as it was", problem=str(problem))
            return
        with self._lock:
            self._key, self._known = key, {}
        _log.info("key of signed tokens read", algorithm=key.algorithm)
        self._on_change()

    def knows(self, identity: Identity) -> bool:
        """Tell whether an identity's token was signed with the present key."""
        return identity.key == self._key.digest

    def find(self, token: str) -> Identity:
        """Return the identity behind a token, expired or not.

        Raises:
            AuthenticationError: the key has not signed it, or its claims are not those of a token for this server.
        """
        digest = digest_of(token)
        if (identity := self._known.get(digest)) is not None:
            return identity
        key, known = self._key, self._known
        identity = self._identity(token, key)
        if identity.expires > self._clock():
            with self._lock:
                if len(known) >= _MOST_KNOWN:
                    known.clear()
                known[digest] = identity
        return identity

    def _identity(self, token: str, key: _Key) -> Identity:
        claims = self._verified(token, key)
        try:
            read = msgspec.convert(claims, _Claims)
        except msgspec.ValidationError as error:
            raise AuthenticationError(
                f"the token's claims are wrong: {error}; it needs sub, role, exp, and may have tenant"
            ) from None
        if not math.isfinite(read.exp) or math.isnan(read.nbf):  # Python's JSON has NaN, which is never past
            raise AuthenticationError("the token's claims are wrong: exp and nbf have to be numbers")
        if read.nbf > self._clock():
            raise AuthenticationError(f"the token {read.sub!r} is not valid yet; wait, or set this machine's clock")
        return Identity(read.sub, read.tenant, read.role, read.exp, key=key.digest)

    def _verified(self, token: str, key: _Key) -> Any:
        import jwt

        if len(token) > _MOST_TOKEN_BYTES:
            raise AuthenticationError(f"the token has {len(token)} characters, more than {_MOST_TOKEN_BYTES}")
        try:
            return jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm],
                issuer=self._issuer,
                audience=self._audience,
                # Times are compared with the clock of all other tokens: an expired one is told in the same words.
                options={"verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_sub": False},
            )
        except (jwt.InvalidAudienceError, jwt.InvalidIssuerError, jwt.MissingRequiredClaimError) as error:
            raise AuthenticationError(f"the token is not for this server: {error}; ask its issuer for one") from None
        except jwt.PyJWTError:
            raise AuthenticationError(
                f"the token is no JWT that this server's key has signed with {key.algorithm}; ask its issuer for "
                "another one"
            ) from None


def _read_key(path: pathlib.Path) -> _Key:
    """Read a key.

    Raises:
        InvalidRequestError: it cannot be read, is no key for signed tokens, or others than its owner may write it.
    """
    data = read_owned(path, "jwt_key", _MOST_KEY_BYTES)
    _require_packages()
    digest = hashlib.sha256(data).hexdigest()
    if b"-----BEGIN" in data:
        return _Key(*_public_key(path, data), digest)
    secret = data.strip()
    if len(secret) < _LEAST_SECRET_BYTES:
        raise InvalidRequestError.of(
            "jwt_key",
            f"{str(path)!r} has a secret of {len(secret)} bytes, which can be guessed; give a random one of "
            f"{_LEAST_SECRET_BYTES} bytes or more, or a public key in PEM",
        )
    return _Key(secret, "HS256", digest)


def _require_packages() -> None:
    try:
        import cryptography
        import jwt
    except ImportError as error:
        raise InvalidRequestError.of(
            "jwt_key",
            f"signed tokens need the packages PyJWT and cryptography, and {error.name} is missing here; "
            "`pip install 'stepwire[jwt]'`",
        ) from None
    del cryptography, jwt


def _public_key(path: pathlib.Path, data: bytes) -> tuple[AllowedPublicKeys, str]:
    """Return a public key with its algorithm.

    Raises:
        InvalidRequestError: it is none, or of a kind without an algorithm here.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY" in data:
        raise InvalidRequestError.of(
            "jwt_key", f"{str(path)!r} has a private key, which signs tokens; give its public key, which verifies them"
        )
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidRequestError.of("jwt_key", f"{str(path)!r} has no public key in PEM that can be read") from None
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key, "EdDSA"
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key, "ES256"
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _LEAST_RSA_BITS:
        return key, "RS256"
    raise InvalidRequestError.of(
        "jwt_key",
        f"{str(path)!r} has a key of another kind; give one of Ed25519 (EdDSA), P-256 (ES256), or RSA of "
        f"{_LEAST_RSA_BITS} bits or more (RS256)",
    )
