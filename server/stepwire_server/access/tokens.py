"""The file of tokens: their digests, never the tokens, with tenant, role and end.

A token is 32 random bytes in text. Its SHA-256 is enough to recognise it, and useless to whoever reads the file: a
random token cannot be guessed, so it needs no slow hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import pathlib
import secrets
import tempfile
from collections.abc import Callable, Sequence
from typing import Annotated, Final

import msgspec
import structlog
from msgspec import Meta

from stepwire.errors import InvalidRequestError
from stepwire_server.access.identity import Identity, Role
from stepwire_server.access.watched_files import WatchedFiles, read_owned

__all__ = ["TOKEN_PREFIX", "TokenFile", "TokenRecord", "digest_of", "new_token", "read_tokens", "write_tokens"]

_log = structlog.get_logger()

TOKEN_PREFIX: Final = "sw_"
_TOKEN_BYTES: Final = 32
_MOST_BYTES: Final = 8 << 20
_NAME: Final = r"^[A-Za-z0-9._-]{1,64}$"


class TokenRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the file.

    Attributes:
        name: the name of the token, for people.
        digest: the SHA-256 of the token, in hexadecimal digits.
        tenant: the tenant whose sessions it sees; empty for the only one.
        role: its role.
        expires: the time of its end, in seconds since 1970; None for none.
    """

    name: Annotated[str, Meta(pattern=_NAME)]
    digest: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    role: Role
    tenant: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    expires: float | None = None

    def identity(self) -> Identity:
        """Return the identity behind the token."""
        return Identity(
            self.name, self.tenant, self.role, math.inf if self.expires is None else self.expires, self.digest
        )


def new_token() -> str:
    """Return a random token."""
    return TOKEN_PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(_TOKEN_BYTES)).decode().rstrip("=")


def digest_of(token: str) -> str:
    """Return the digest of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def read_tokens(path: pathlib.Path) -> list[TokenRecord]:
    """Read a file of tokens.

    Raises:
        InvalidRequestError: it cannot be read, is not such a file, or others than its owner may write it.
    """
    data = read_owned(path, "tokens", _MOST_BYTES)
    try:
        records = msgspec.json.decode(data, type=list[TokenRecord])
    except msgspec.DecodeError as error:
        raise InvalidRequestError.of("tokens", f"{str(path)!r} is no file of tokens: {error}") from None
    for field in ("name", "digest"):
        values = [getattr(record, field) for record in records]
        if len(set(values)) < len(values):
            raise InvalidRequestError.of("tokens", f"{str(path)!r} has a {field} twice; remove one of the lines")
    return records


def write_tokens(path: pathlib.Path, records: Sequence[TokenRecord]) -> None:
    """Replace a file of tokens, all at once; only its owner may read it.

    Raises:
        OSError: it cannot be written; the file is as before.
    """
    lines = b",\n ".join(msgspec.json.encode(record) for record in records)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(b"[" + lines + b"]\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


class TokenFile:
    """The tokens that a server knows: those of its file, read again when the file changes. Thread-safe.

    Attributes:
        path: the file.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Read a file.

        Raises:
            InvalidRequestError: as `read_tokens`.
        """
        self.path = path
        self._file = WatchedFiles(path)
        self._identities = {record.digest: record.identity() for record in read_tokens(path)}
        self._on_change: Callable[[], object] = lambda: None

    def on_change(self, tell: Callable[[], object]) -> None:
        """Call a function after the file has changed."""
        self._on_change = tell

    def find(self, token: str) -> Identity | None:
        """Return the identity behind a token, expired or not; None for none."""
        return self._identities.get(digest_of(token))

    def knows(self, identity: Identity) -> bool:
        """Tell whether a token is still in the file, as it was."""
        return self._identities.get(identity.digest) == identity

    def look(self) -> None:
        """Read the file again if it has changed. A file that is wrong changes nothing, and is logged."""
        if not self._file.changed():
            return
        try:
            records = read_tokens(self.path)
        except InvalidRequestError as problem:
            _log.error("the tokens stay as they were", problem=str(problem))
            return
        self._identities = {record.digest: record.identity() for record in records}
        _log.info("tokens read", count=len(records))
        self._on_change()
