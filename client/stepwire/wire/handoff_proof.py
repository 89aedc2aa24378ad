"""The proof that whoever fetches memory shows the access token of whoever attached, without a word of either token."""

from __future__ import annotations

import hashlib
import hmac

__all__ = ["handoff_proof"]


def handoff_proof(access_token: str, handoff_token: bytes) -> bytes:
    """Return the HMAC-SHA256 of a handoff's token, keyed with the SHA-256 of an access token; empty without one."""
    if not access_token:
        return b""
    key = hashlib.sha256(access_token.encode("utf-8", "surrogateescape")).digest()
    return hmac.digest(key, handoff_token, "sha256")
