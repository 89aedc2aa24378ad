"""Digests in the place of secrets in log lines: a reader of the log can neither attach to a session nor call a server.

Whoever knows a session's id may step it, and whoever knows a token may call with its rights. Both are random, so the
beginning of their SHA-256 is enough to tell them apart, and useless for more. `stepwire sessions` shows the digest of
each session, so an operator finds the lines of one.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

__all__ = ["digest_in_logs", "without_secrets"]

_MARK: Final = "~"
_DIGITS: Final = 12
# A session's id; a token of `stepwire token create`; a JWT, which begins with the base64 of `{"`.
_SECRET: Final = re.compile(
    r"(?<![0-9a-zA-Z])[0-9a-f]{32}(?![0-9a-zA-Z])"
    r"|(?<![\w-])sw_[\w-]{20,}"
    r"|(?<![\w-])eyJ[\w-]+\.[\w-]+\.[\w-]*"
)


def digest_in_logs(secret: str) -> str:
    """Return the digest of a session's id or a token as log lines have it: `~` and 12 hexadecimal digits."""
    return _MARK + hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()[:_DIGITS]


def without_secrets(text: str) -> str:
    """Return a text with the digests of session ids and tokens in their places."""
    return _SECRET.sub(lambda found: digest_in_logs(found[0]), text)
